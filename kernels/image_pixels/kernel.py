"""A result in [-1, 1] as pixels of an array of any strides: integers are rounded, floats are 0 to 1.

The target begins `offset` elements after its pointer, which is aligned as every buffer is. Compiled without
fused multiply-add, the values are those of the host.
"""

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a float32 and taken off again, it rounds to an integer, half to even."""


@triton.jit
def level(value, top):
    """Return values of [-1, 1] as integers in 0..top, in float32."""
    value = tl.minimum(tl.maximum((value + 1.0) * (top * 0.5), 0.0), top)
    return (value + ROUNDER) - ROUNDER


@triton.jit
def image_pixels(
    content,
    colored,
    target,
    height,
    width,
    content_plane,
    content_row,
    channels,
    offset,
    stride_y,
    stride_x,
    stride_c,
    top,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of pixels). Reads float32 [3, .., ..] and writes `channels` (1 or 3) of `target`.

    If `colored` int32 [1] is 0, or with one channel, the luma of the three channels is written. `top` is 255
    or 65535 for integers; floats take the levels of 65535 over 65535.
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x, inside = (pixel // width).to(tl.int64), pixel % width, pixel < height * width
    place = content + y * content_row + x
    red = level(tl.load(place, mask=inside, other=0.0), top)
    plane = tl.zeros((1,), tl.int64) + content_plane
    green = level(tl.load(place + plane, mask=inside, other=0.0), top)
    blue = level(tl.load(place + 2 * plane, mask=inside, other=0.0), top)
    luma = red * 0.299 + green * 0.587 + blue * 0.114
    luma = (luma + ROUNDER) - ROUNDER
    grey = tl.load(colored) * (channels // 3) == 0
    red, green, blue = tl.where(grey, luma, red), tl.where(grey, luma, green), tl.where(grey, luma, blue)
    out = target + offset + y * stride_y + x * stride_x
    three = pixel < height * width * (channels // 3)
    if target.dtype.element_ty.is_floating():
        kind = target.dtype.element_ty
        tl.store(out, (red / top).to(kind), mask=inside)
        tl.store(out + stride_c, (green / top).to(kind), mask=three)
        tl.store(out + 2 * stride_c, (blue / top).to(kind), mask=three)
    else:
        kind = target.dtype.element_ty
        tl.store(out, red.to(tl.int32).to(kind), mask=inside)
        tl.store(out + stride_c, green.to(tl.int32).to(kind), mask=three)
        tl.store(out + 2 * stride_c, blue.to(tl.int32).to(kind), mask=three)
