"""Finds the nearest code of every latent; a program holds some latents and walks over the codebook.

Compiled without fused multiply-add (`fp_fusion=False`), the distances equal the reference's to the last bit.
Of equal distances the lower index wins.
"""

import triton
import triton.language as tl


@triton.jit
def vq_nearest(
    z,
    planes,
    table,
    values,
    indices,
    pixels,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write int32 `indices` [B, pixels] and `values` [B, OUT_WIDTH, pixels]. Grid: (blocks of pixels, batch).

    `z` is [B, WIDTH, pixels]. `planes`, float32 [WIDTH + 1, CODES], holds the codes times -2 (one row per
    component) and |code|^2; CODES is a multiple of `BLOCK_N`, filled up with infinite norms. The values are
    rows of `table` [codes, OUT_WIDTH].
    """
    batch = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < pixels
    latent = ()
    for i in tl.static_range(WIDTH):
        component = tl.load(z + (batch * WIDTH + i) * pixels + pixel, mask=inside, other=0.0)
        latent = latent + (component.to(tl.float32)[:, None],)  # noqa: RUF005
    code = tl.arange(0, BLOCK_N)[None, :]
    nearest = tl.full([BLOCK_M, BLOCK_N], float("inf"), tl.float32)
    block = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)  # the start of the block with each lane's nearest code
    for start in range(0, CODES, BLOCK_N):
        distance = tl.broadcast_to(tl.load(planes + WIDTH * CODES + start + code), [BLOCK_M, BLOCK_N])
        for i in tl.static_range(WIDTH):
            distance = distance + latent[i] * tl.load(planes + i * CODES + start + code)
        closer = distance < nearest
        nearest = tl.where(closer, distance, nearest)
        block = tl.where(closer, start, block)
    first = tl.where(nearest == tl.min(nearest, 1)[:, None], block + code, CODES)
    index = tl.min(first, 1)
    tl.store(indices + batch * pixels + pixel, index, mask=inside)
    for i in tl.static_range(OUT_WIDTH):
        value = tl.load(table + index * OUT_WIDTH + i, mask=inside)
        tl.store(values + (batch * OUT_WIDTH + i) * pixels + pixel, value, mask=inside)
