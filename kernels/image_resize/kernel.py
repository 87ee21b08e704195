"""Weighted sums along one axis of an image [H, W, 3]; two launches resize it.

Compiled without fused multiply-add (`fp_fusion=False`), the sums are those of the host to the last bit: each
is a float64 that grows tap by tap. Buffers of 64-bit values are declared as int64 and hold float64.
"""

import triton
import triton.language as tl

ROUNDER = tl.constexpr(6755399441055744.0)
"""1.5 * 2**52: added to a float64 and taken off again, it rounds to an integer, half to even."""


@triton.jit
def rounded(value, top):
    """Return float64 values as integers in 0..top, or as they are if `top` is 0."""
    whole = tl.minimum(tl.maximum((value + ROUNDER) - ROUNDER, 0.0), top)
    return tl.where(top > 0, whole, value)


@triton.jit
def position(height, width, BLOCK: tl.constexpr):
    """Return channel, x, y and the mask of this program's elements of a dense [height, width, 3]."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel = flat // 3
    return flat % 3, pixel % width, pixel // width, pixel // width < height


@triton.jit
def first_pass(
    source,
    between,
    index,
    weight,
    taps,
    height,
    width,
    along_rows,
    offset,
    stride_y,
    stride_x,
    stride_c,
    gain,
    levels,
    top,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of the output). Reads an image of any type and strides, writes float64 [.., width, 3].

    The image begins `offset` elements after `source`, which is aligned as every buffer is.

    A value is multiplied by `gain` and, if `levels` is not 0, rounded and clipped to 0..levels. The sums run
    along the rows of the output (1) or along its columns (0), over `taps` positions `index` [out, taps] with
    `weight` [out, taps] in float64. If `top` is not 0, they are rounded and clipped to 0..top.
    """
    c, x, y, inside = position(height, width, BLOCK)
    out = tl.where(along_rows != 0, y, x)
    total = tl.zeros((BLOCK,), tl.float64)
    weights = weight.to(tl.pointer_type(tl.float64), bitcast=True)
    for tap in range(taps):
        at = tl.load(index + out * taps + tap, mask=inside, other=0).to(tl.int64)
        share = tl.load(weights + out * taps + tap, mask=inside, other=0.0)
        row = tl.where(along_rows != 0, at, y)
        column = tl.where(along_rows != 0, x, at)
        place = offset + row * stride_y + column * stride_x + c * stride_c
        value = tl.load(source + place, mask=inside, other=0).to(tl.float64) * gain
        value = tl.where(value == value, value, 0.0)
        total += rounded(value, levels) * share
    target = between.to(tl.pointer_type(tl.float64), bitcast=True)
    tl.store(target + (y * width + x) * 3 + c, rounded(total, top), mask=inside)


@triton.jit
def second_pass(
    between,
    target,
    index,
    weight,
    taps,
    height,
    width,
    source_width,
    along_rows,
    stride_y,
    stride_x,
    stride_c,
    top,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of the output). Reads a dense float64 [.., source_width, 3], writes [height, width, 3].

    The strides are those of the target. The sums are those of `first_pass`.
    """
    c, x, y, inside = position(height, width, BLOCK)
    out = tl.where(along_rows != 0, y, x)
    total = tl.zeros((BLOCK,), tl.float64)
    weights = weight.to(tl.pointer_type(tl.float64), bitcast=True)
    source = between.to(tl.pointer_type(tl.float64), bitcast=True)
    for tap in range(taps):
        at = tl.load(index + out * taps + tap, mask=inside, other=0).to(tl.int64)
        share = tl.load(weights + out * taps + tap, mask=inside, other=0.0)
        row = tl.where(along_rows != 0, at, y)
        column = tl.where(along_rows != 0, x, at)
        total += tl.load(source + (row * source_width + column) * 3 + c, mask=inside, other=0.0) * share
    value = rounded(total, top)
    place = target + y * stride_y + x * stride_x + c * stride_c
    if target.dtype.element_ty.is_floating():
        tl.store(place, value.to(target.dtype.element_ty), mask=inside)
    else:
        tl.store(place, value.to(tl.int32).to(target.dtype.element_ty), mask=inside)
