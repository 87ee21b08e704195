"""GroupNorm + SiLU in two launches: partial statistics, then normalise, scale and activate.

A partial is (mean, sum of squared deviations) of one group over one part of the pixels, so that parts can be
combined without cancellation. Statistics and arithmetic are float32 for every type of x.
"""

import triton
import triton.language as tl


@triton.jit
def statistics_nchw(x, partial, SIZE: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Compute partials [B * groups, parts, 2] over PART of SIZE values. Grid (B * groups, parts)."""
    group, part = tl.program_id(0), tl.program_id(1)
    start = part * PART
    base = x + group.to(tl.int64) * SIZE
    shift = tl.load(base + start).to(tl.float32)  # near the mean: sums of x - shift do not cancel
    total = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for i in range(0, PART, BLOCK):
        offset = start + i + tl.arange(0, BLOCK)
        inside = (offset < SIZE) & (i + tl.arange(0, BLOCK) < PART)
        value = tl.load(base + offset, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - shift, 0.0)
        total += value
        squares += value * value
    count = tl.minimum(PART, SIZE - start).to(tl.float32)
    mean = tl.sum(total) / count
    out = partial + (group * tl.num_programs(1) + part) * 2
    tl.store(out, shift + mean)
    tl.store(out + 1, tl.sum(squares) - mean * mean * count)


@triton.jit
def apply_nchw(
    x, weight, bias, partial, y, eps, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise BLOCK pixels of one channel. Grid (B * C, cdiv(pixels, BLOCK))."""
    plane = tl.program_id(0)
    channel = plane % CHANNELS
    size: tl.constexpr = CHANNELS // GROUPS * PIXELS
    group = plane // (CHANNELS // GROUPS)
    index = tl.arange(0, PARTS_PAD)
    known = index < PARTS
    pointer = partial + (group * PARTS + index) * 2
    count = tl.where(known, tl.minimum(PART, size - index * PART), 0).to(tl.float32)
    means = tl.load(pointer, mask=known, other=0.0)
    mean = tl.sum(means * count) / size
    spread = tl.load(pointer + 1, mask=known, other=0.0) + count * (means - mean) * (means - mean)
    scale = tl.load(weight + channel).to(tl.float32) / tl.sqrt(tl.sum(spread) / size + eps)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < PIXELS
    base = plane.to(tl.int64) * PIXELS
    value = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
    value = (value - mean) * scale + tl.load(bias + channel).to(tl.float32)
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(y + base + offset, value, mask=inside)


@triton.jit
def statistics_nhwc(
    x, partial, GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, PIXELS: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Compute partials [B, parts, groups, 2] over PART pixels. Grid (B, parts, GROUPS / SPAN)."""
    batch, part, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * SPAN
    start = part * PART
    slot = tl.arange(0, SPAN * WIDTH_PAD)
    column = first * WIDTH + slot // WIDTH_PAD * WIDTH + slot % WIDTH_PAD
    real = slot % WIDTH_PAD < WIDTH
    base = x + batch.to(tl.int64) * (PIXELS * GROUPS * WIDTH)
    head = (first + tl.arange(0, SPAN)) * WIDTH
    shift = tl.load(base + start * (GROUPS * WIDTH) + head).to(tl.float32)  # [SPAN]
    shifts = tl.reshape(tl.broadcast_to(shift[:, None], [SPAN, WIDTH_PAD]), [SPAN * WIDTH_PAD])
    total = tl.zeros([BLOCK, SPAN * WIDTH_PAD], tl.float32)
    squares = tl.zeros([BLOCK, SPAN * WIDTH_PAD], tl.float32)
    for i in range(0, PART, BLOCK):
        pixel = start + i + tl.arange(0, BLOCK)
        inside = ((pixel < PIXELS) & (i + tl.arange(0, BLOCK) < PART))[:, None] & real[None, :]
        value = tl.load(base + pixel[:, None] * (GROUPS * WIDTH) + column[None, :], mask=inside, other=0.0)
        value = tl.where(inside, value.to(tl.float32) - shifts[None, :], 0.0)
        total += value
        squares += value * value
    count = tl.minimum(PART, PIXELS - start).to(tl.float32) * WIDTH
    mean = tl.sum(tl.reshape(tl.sum(total, 0), [SPAN, WIDTH_PAD]), 1) / count
    spread = tl.sum(tl.reshape(tl.sum(squares, 0), [SPAN, WIDTH_PAD]), 1) - mean * mean * count
    out = partial + ((batch * tl.num_programs(1) + part) * GROUPS + first + tl.arange(0, SPAN)) * 2
    tl.store(out, shift + mean)
    tl.store(out + 1, spread)


@triton.jit
def apply_nhwc(
    x, weight, bias, partial, y, eps, GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    PIXELS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr,
    SILU: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Normalise RUN pixels of SPAN groups, BLOCK at a time. Grid (B, cdiv(pixels, RUN), GROUPS / SPAN)."""
    batch, first = tl.program_id(0), tl.program_id(2) * SPAN
    groups = first + tl.arange(0, SPAN)
    index = tl.arange(0, PARTS_PAD)
    known = (index < PARTS)[:, None] & (groups < GROUPS)[None, :]
    pointer = partial + ((batch * PARTS + index[:, None]) * GROUPS + groups[None, :]) * 2
    count = tl.where(index < PARTS, tl.minimum(PART, PIXELS - index * PART), 0)[:, None].to(tl.float32)
    means = tl.load(pointer, mask=known, other=0.0)
    mean = tl.sum(means * count, 0) / PIXELS
    spread = tl.load(pointer + 1, mask=known, other=0.0)
    spread = tl.sum(spread + count * WIDTH * (means - mean[None, :]) * (means - mean[None, :]), 0)
    inverse = 1.0 / tl.sqrt(spread / (PIXELS * WIDTH) + eps)  # [SPAN]
    slot = tl.arange(0, SPAN * WIDTH_PAD)
    column = first * WIDTH + slot // WIDTH_PAD * WIDTH + slot % WIDTH_PAD
    real = slot % WIDTH_PAD < WIDTH
    scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    scale *= tl.reshape(tl.broadcast_to(inverse[:, None], [SPAN, WIDTH_PAD]), [SPAN * WIDTH_PAD])
    centre = tl.reshape(tl.broadcast_to(mean[:, None], [SPAN, WIDTH_PAD]), [SPAN * WIDTH_PAD])
    shift = tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
    base = batch.to(tl.int64) * (PIXELS * GROUPS * WIDTH)
    for i in range(0, RUN, BLOCK):
        pixel = tl.program_id(1) * RUN + i + tl.arange(0, BLOCK)
        inside = (pixel < PIXELS)[:, None] & real[None, :]
        offset = base + pixel[:, None] * (GROUPS * WIDTH) + column[None, :]
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        value = (value - centre[None, :]) * scale[None, :] + shift[None, :]
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(y + offset, value, mask=inside)
