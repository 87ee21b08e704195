"""Color correction of a result towards its input, with regions of white and black protected.

`content` is the result, float32 [3, .., ..] in [-1, 1] with a stride between planes and one between rows.
`style` is the input enlarged to the same size, uint8 or uint16 [.., .., 3] with a stride between rows. Cells
are squares of 4x4 pixels, [3, cells_h, cells_w]; the README explains which are clipped. 64-bit
buffers are declared as int64 and hold float64. Compiled without fused multiply-add.
"""

import triton
import triton.language as tl

WHITE = tl.constexpr(1.0 - 4.0 / 255.0)
VARIANCE_EPS = tl.constexpr(1e-5)


@triton.jit
def unit(pixel, BYTES: tl.constexpr):
    """Map pixels to [-1, 1]."""
    if BYTES == 1:
        return pixel.to(tl.float32) * (2.0 / 255.0) - 1.0
    return pixel.to(tl.float32) * (2.0 / 65535.0) - 1.0


@triton.jit
def clip_cells(
    style,
    flags,
    colored,
    height,
    width,
    style_row,
    cells_h,
    cells_w,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of cells). Sets bit 0 of a cell's flag if it is white, and bit 1 if it is black.

    `colored` int32 [1] becomes 1 if the channels of any pixel differ.
    """
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cell_y, cell_x, known = cell // cells_w, cell % cells_w, cell < cells_h * cells_w
    red_low = tl.full((BLOCK,), 2.0, tl.float32)
    green_low, blue_low = red_low, red_low
    red_high, green_high, blue_high = -red_low, -red_low, -red_low
    differ = tl.zeros((BLOCK,), tl.int32)
    for i in range(16):
        y, x = cell_y * 4 + i // 4, cell_x * 4 + i % 4
        inside = known & (y < height) & (x < width)
        at = style + y.to(tl.int64) * style_row + x * 3
        red = unit(tl.load(at, mask=inside, other=0), BYTES)
        green = unit(tl.load(at + 1, mask=inside, other=0), BYTES)
        blue = unit(tl.load(at + 2, mask=inside, other=0), BYTES)
        differ = tl.maximum(differ, (inside & ((red != green) | (green != blue))).to(tl.int32))
        red_low = tl.minimum(red_low, tl.where(inside, red, 2.0))
        green_low = tl.minimum(green_low, tl.where(inside, green, 2.0))
        blue_low = tl.minimum(blue_low, tl.where(inside, blue, 2.0))
        red_high = tl.maximum(red_high, tl.where(inside, red, -2.0))
        green_high = tl.maximum(green_high, tl.where(inside, green, -2.0))
        blue_high = tl.maximum(blue_high, tl.where(inside, blue, -2.0))
    cells = cells_h * cells_w
    tl.store(flags + cell, flag(red_low, red_high), mask=known)
    tl.store(flags + cells + cell, flag(green_low, green_high), mask=known)
    tl.store(flags + 2 * cells + cell, flag(blue_low, blue_high), mask=known)
    tl.store(colored + cell * 0, tl.full((BLOCK,), 1, tl.int32), mask=differ != 0)


@triton.jit
def flag(low, high):
    """Return the two bits of a cell."""
    return ((low >= WHITE).to(tl.int32) + 2 * (high <= -WHITE).to(tl.int32)).to(tl.uint8)


@triton.jit
def clip_regions(flags, regions, cells_h, cells_w, BLOCK: tl.constexpr):
    """Grid: (blocks of cells, 3). A clipped cell belongs to a square of 3x3 cells with the same bit set."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x, known = cell // cells_w, cell % cells_w, cell < cells_h * cells_w
    plane = flags + tl.program_id(1) * cells_h * cells_w
    found = tl.zeros((BLOCK,), tl.int32)
    for square in range(9):
        middle_y, middle_x = y + square // 3 - 1, x + square % 3 - 1
        every = ((middle_y >= 0) & (middle_y < cells_h) & (middle_x >= 0) & (middle_x < cells_w)).to(
            tl.int32
        ) * 3
        for i in range(9):
            at_y, at_x = middle_y + i // 3 - 1, middle_x + i % 3 - 1
            inside = known & (at_y >= 0) & (at_y < cells_h) & (at_x >= 0) & (at_x < cells_w)
            every = every & tl.load(plane + at_y * cells_w + at_x, mask=inside, other=3).to(tl.int32)
        found = found | every
    own = tl.load(plane + cell, mask=known, other=0).to(tl.int32)
    region = regions + tl.program_id(1) * cells_h * cells_w
    tl.store(region + cell, ((found & own) != 0).to(tl.uint8), mask=known)


@triton.jit
def clip_fade(regions, fade, cells_h, cells_w, BLOCK: tl.constexpr):
    """Grid: (blocks of cells, 3). 0 in and beside clipped cells, and 1 from eight cells further on."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x, known = cell // cells_w, cell % cells_w, cell < cells_h * cells_w
    plane = regions + tl.program_id(1) * cells_h * cells_w
    distance = tl.full((BLOCK,), 9, tl.int32)
    for i in range(17 * 17):
        down, right = i // 17 - 8, i % 17 - 8
        at_y, at_x = y + down, x + right
        inside = known & (at_y >= 0) & (at_y < cells_h) & (at_x >= 0) & (at_x < cells_w)
        clipped = tl.load(plane + at_y * cells_w + at_x, mask=inside, other=0) != 0
        far = tl.maximum(tl.abs(at_y - y), tl.abs(at_x - x))
        distance = tl.where(clipped, tl.minimum(distance, far), distance)
    value = tl.maximum(distance - 1, 0).to(tl.float32) / 8.0
    tl.store(fade + tl.program_id(1) * cells_h * cells_w + cell, value, mask=known)


@triton.jit
def statistics(
    content,
    style,
    regions,
    partial,
    height,
    width,
    content_plane,
    content_row,
    style_row,
    cells_h,
    cells_w,
    BYTES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (PROGRAMS, 3). Writes float64 [3, 5, PROGRAMS]: count, sums and squares of both images."""
    channel = tl.program_id(1).to(tl.int64)
    count = tl.zeros((BLOCK,), tl.float64)
    content_sum, content_square, style_sum, style_square = count, count, count, count
    for start in range(tl.program_id(0) * BLOCK, height * width, PROGRAMS * BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        y, x = (pixel // width).to(tl.int64), pixel % width
        cell = (channel * cells_h + y // 4) * cells_w + x // 4
        inside = pixel < height * width
        used = inside & (tl.load(regions + cell, mask=inside, other=1) == 0)
        a = tl.load(content + channel * content_plane + y * content_row + x, mask=used, other=0.0)
        b = unit(tl.load(style + y * style_row + x * 3 + channel, mask=used, other=0), BYTES)
        a, b = tl.where(used, a, 0.0).to(tl.float64), tl.where(used, b, 0.0).to(tl.float64)
        count += used.to(tl.float64)
        content_sum, content_square = content_sum + a, content_square + a * a
        style_sum, style_square = style_sum + b, style_square + b * b
    out = partial.to(tl.pointer_type(tl.float64), bitcast=True) + channel * 5 * PROGRAMS + tl.program_id(0)
    tl.store(out, tl.sum(count, 0))
    tl.store(out + PROGRAMS, tl.sum(content_sum, 0))
    tl.store(out + 2 * PROGRAMS, tl.sum(content_square, 0))
    tl.store(out + 3 * PROGRAMS, tl.sum(style_sum, 0))
    tl.store(out + 4 * PROGRAMS, tl.sum(style_square, 0))


@triton.jit
def deviation(count, mean, squares):
    """Return the standard deviation that adaptive instance normalisation uses."""
    variance = (squares - count * mean * mean) / tl.maximum(count - 1.0, 1.0)
    return tl.sqrt(tl.maximum(variance, 0.0) + VARIANCE_EPS)


@triton.jit
def gains(partial, gain, PROGRAMS: tl.constexpr):
    """Grid: (3,). Writes float32 [3, 2]: the factor less 1, and the summand, of each channel."""
    place = partial.to(tl.pointer_type(tl.float64), bitcast=True) + tl.program_id(0) * 5 * PROGRAMS
    place += tl.arange(0, PROGRAMS)
    count = tl.sum(tl.load(place), 0)
    pixels = tl.maximum(count, 1.0)
    content_mean = tl.sum(tl.load(place + PROGRAMS), 0) / pixels
    content = deviation(count, content_mean, tl.sum(tl.load(place + 2 * PROGRAMS), 0))
    style_mean = tl.sum(tl.load(place + 3 * PROGRAMS), 0) / pixels
    style = deviation(count, style_mean, tl.sum(tl.load(place + 4 * PROGRAMS), 0))
    factor = style / content
    tl.store(gain + tl.program_id(0) * 2, (factor - 1.0).to(tl.float32))
    tl.store(gain + tl.program_id(0) * 2 + 1, (style_mean - content_mean * factor).to(tl.float32))


@triton.jit
def difference(
    content,
    style,
    regions,
    low,
    height,
    width,
    content_plane,
    content_row,
    style_row,
    cells_h,
    cells_w,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of pixels, 3). Writes style - content, and 0 in clipped cells, to a dense [3, H, W]."""
    channel, pixel = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x, inside = (pixel // width).to(tl.int64), pixel % width, pixel < height * width
    cell = (channel * cells_h + y // 4) * cells_w + x // 4
    clipped = tl.load(regions + cell, mask=inside, other=1) != 0
    a = tl.load(content + channel * content_plane + y * content_row + x, mask=inside, other=0.0)
    b = unit(tl.load(style + y * style_row + x * 3 + channel, mask=inside, other=0), BYTES)
    out = low + channel * height * width + pixel
    tl.store(out, tl.where(clipped, 0.0, b - a), mask=inside)


@triton.jit
def blur(source, target, height, width, distance, along_rows, BLOCK: tl.constexpr):
    """Grid: (blocks of pixels, 3). [1 2 1] / 4 of a dense [3, H, W] along one axis, with replicated edges."""
    channel, pixel = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x, inside = pixel // width, pixel % width, pixel < height * width
    down, right = tl.where(along_rows != 0, distance, 0), tl.where(along_rows != 0, 0, distance)
    plane = source + channel * height * width
    before = tl.maximum(y - down, 0) * width + tl.maximum(x - right, 0)
    after = tl.minimum(y + down, height - 1) * width + tl.minimum(x + right, width - 1)
    value = tl.load(plane + pixel, mask=inside, other=0.0) * 2.0
    value += tl.load(plane + before, mask=inside, other=0.0)
    value += tl.load(plane + after, mask=inside, other=0.0)
    tl.store(target + channel * height * width + pixel, value * 0.25, mask=inside)


@triton.jit
def neighbours(position, count):
    """Return the two cells whose centers surround each pixel, and the weight of the second one."""
    place = (position.to(tl.float32) + 0.5) / 4.0 - 0.5
    place = tl.minimum(tl.maximum(place, 0.0), count - 1.0)
    first = place.to(tl.int32)
    return first, tl.minimum(first + 1, count - 1), place - first.to(tl.float32)


@triton.jit
def correct(
    content,
    style,
    regions,
    fade,
    given,
    height,
    width,
    content_plane,
    content_row,
    style_row,
    cells_h,
    cells_w,
    METHOD: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of pixels, 3). Corrects `content` in place as far as clipped regions allow.

    `given` is the blurred difference [3, H, W] for METHOD 2 (wavelet) and the gains [3, 2] for 1 (adain).
    METHOD 0 corrects nothing but clipped regions.
    """
    channel, pixel = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, x, inside = pixel // width, pixel % width, pixel < height * width
    place = content + channel * content_plane + y.to(tl.int64) * content_row + x
    value = tl.load(place, mask=inside, other=0.0)
    target = unit(tl.load(style + y.to(tl.int64) * style_row + x * 3 + channel, mask=inside, other=0), BYTES)
    if METHOD == 0:
        correction = value * 0.0
    elif METHOD == 2:
        correction = tl.load(given + channel * height * width + pixel, mask=inside, other=0.0)
    else:
        correction = value * tl.load(given + channel * 2) + tl.load(given + channel * 2 + 1)
    top, below, part_y = neighbours(y, cells_h)
    left, right, part_x = neighbours(x, cells_w)
    a, b = top * cells_w + left, below * cells_w + left
    c, d = top * cells_w + right, below * cells_w + right
    plane = channel * cells_h * cells_w
    free = fade + plane
    first = tl.load(free + a, mask=inside) * (1.0 - part_y) + tl.load(free + b, mask=inside) * part_y
    second = tl.load(free + c, mask=inside) * (1.0 - part_y) + tl.load(free + d, mask=inside) * part_y
    correction = correction * (first * (1.0 - part_x) + second * part_x) + value
    own = regions + plane
    first = tl.load(own + a, mask=inside).to(tl.float32) * (1.0 - part_y)
    first += tl.load(own + b, mask=inside).to(tl.float32) * part_y
    second = tl.load(own + c, mask=inside).to(tl.float32) * (1.0 - part_y)
    second += tl.load(own + d, mask=inside).to(tl.float32) * part_y
    pinned = tl.maximum(2.0 * (first * (1.0 - part_x) + second * part_x) - 1.0, 0.0)
    tl.store(place, correction + (target - correction) * pinned, mask=inside)
