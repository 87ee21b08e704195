"""The nearest code of every latent, the codebook streamed past the latents' distances so far.

Compile without fused multiply-add (`fp_fusion=False`): distances are then the reference's to the last bit,
and so are the ties, which the lower index wins.
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
    """Grid: (blocks of pixels, batch). `z` [B, WIDTH, pixels], `planes` float32 [WIDTH + 1, CODES].

    `planes` are the codes times -2, a plane for each component, then |code|^2; `BLOCK_N` divides CODES (fill
    up with infinite norms). Writes `values` [B, OUT_WIDTH, pixels], rows of `table` [codes, OUT_WIDTH], and
    int32 `indices` [B, pixels].
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
    block = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)  # where each lane found its nearest
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
