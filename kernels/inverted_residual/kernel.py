"""Expand, depthwise 3x3 and reduce in one launch.

The wide tensor exists only for one tile and CHUNK channels at a time. A tile is a grid of GH x GW pixels with
a halo of one pixel around its (GH - 2) x (GW - 2) outputs, so that all products run over the same power of
two. Each program writes the chunk to scratch memory of its own and reads it back at nine shifts as the
depthwise convolution. The program overwrites the same scratch memory again and again, so it stays in the
cache.
"""

import triton
import triton.language as tl

SLOPE = tl.constexpr(0.1)


@triton.jit
def _leaky(x):
    return tl.where(x > 0, x, x * SLOPE)


@triton.jit
def _pixels(source, real, c, CIN: tl.constexpr, X_CHANNEL: tl.constexpr):
    """Load channels `c` of the grid, with zeros outside the image."""
    return tl.load(source + c[None, :] * X_CHANNEL, mask=real[:, None] & (c < CIN)[None, :], other=0.0)


@triton.jit
def inverted_residual(
    x, expand, expand_bias, depthwise, depthwise_bias, reduce, reduce_bias, scratch, y, batch,
    CIN: tl.constexpr, INNER: tl.constexpr, COUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    X_PIXEL: tl.constexpr, X_CHANNEL: tl.constexpr, Y_PIXEL: tl.constexpr, Y_CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
    CO: tl.constexpr,
):  # fmt: skip
    """Compute all tiles with a fixed number of programs, each of which takes every programs-th tile.

    `expand` is [INNER, CIN], `depthwise` [9, INNER], `reduce` [COUT, INNER] and `scratch`
    [programs, GH * GW, CHUNK].
    """
    program = tl.program_id(0)
    kind: tl.constexpr = x.dtype.element_ty
    p = tl.arange(0, GH * GW)
    across: tl.constexpr = (W + GW - 3) // (GW - 2)
    down: tl.constexpr = (H + GH - 3) // (GH - 2)
    wide, out = tl.arange(0, CHUNK), tl.arange(0, CO)
    mine = scratch + program * (GH * GW * CHUNK) + wide[None, :]
    programs = tl.num_programs(0)
    for turn in range(0, tl.cdiv(batch * (down * across) - program, programs)):
        tile = program + turn * programs
        image = (tile // (down * across)).to(tl.int64)
        row = tile // across % down * (GH - 2) - 1 + p // GW
        column = tile % across * (GW - 2) - 1 + p % GW
        real = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        source = x + image * (CIN * H * W) + (row * W + column)[:, None] * X_PIXEL
        total = tl.zeros([GH * GW, CO], tl.float32)
        first_pixels = _pixels(source, real, tl.arange(0, BLOCK_C), CIN, X_CHANNEL)
        for start in range(0, INNER, CHUNK):
            k = start + wide
            h = tl.zeros([GH * GW, CHUNK], tl.float32)
            for first in range(0, CIN, BLOCK_C):
                c = first + tl.arange(0, BLOCK_C)
                pixels = first_pixels  # all channels, if they stay on the chip
                if BLOCK_C < CIN:
                    pixels = _pixels(source, real, c, CIN, X_CHANNEL)
                weight = tl.load(
                    expand + k[None, :] * CIN + c[:, None],
                    mask=(k < INNER)[None, :] & (c < CIN)[:, None],
                    other=0.0,
                )
                h = tl.dot(pixels, weight, h, input_precision=PRECISION)
            h = _leaky(h + tl.load(expand_bias + k, mask=k < INNER, other=0.0)[None, :])
            tl.debug_barrier()  # all threads have read the previous chunk
            tl.store(mine + p[:, None] * CHUNK, tl.where(real[:, None], h, 0.0).to(kind))  # zero padding
            tl.debug_barrier()
            even = tl.zeros([GH * GW, CHUNK], tl.float32)
            odd = tl.zeros([GH * GW, CHUNK], tl.float32)
            for tap in tl.static_range(9):
                q = p + (tap // 3 - 1) * GW + tap % 3 - 1
                near = tl.load(mine + q[:, None] * CHUNK, mask=((q >= 0) & (q < GH * GW))[:, None], other=0.0)
                weight = tl.load(depthwise + tap * INNER + k, mask=k < INNER, other=0.0).to(tl.float32)
                if tap % 2 == 0:
                    even += near.to(tl.float32) * weight[None, :]
                else:
                    odd += near.to(tl.float32) * weight[None, :]
            # The reduction keeps the compiler from converting each tap to the product's layout on its own.
            h = tl.sum(tl.join(even, odd), 2)
            h = _leaky(h + tl.load(depthwise_bias + k, mask=k < INNER, other=0.0)[None, :]).to(kind)
            weight = tl.load(
                reduce + out[None, :] * INNER + k[:, None],
                mask=(k < INNER)[:, None] & (out < COUT)[None, :],
                other=0.0,
            )
            total = tl.dot(h, weight, total, input_precision=PRECISION)
        inner = real & (p // GW > 0) & (p // GW < GH - 1) & (p % GW > 0) & (p % GW < GW - 1)
        known = inner[:, None] & (out < COUT)[None, :]
        total += tl.load(reduce_bias + out, mask=out < COUT, other=0.0)[None, :]
        if CIN == COUT:
            total += tl.load(source + out[None, :] * X_CHANNEL, mask=known, other=0.0).to(tl.float32)
        target = y + image * (COUT * H * W) + (row * W + column)[:, None] * Y_PIXEL + out[None, :] * Y_CHANNEL
        tl.store(target, total.to(kind), mask=known)
