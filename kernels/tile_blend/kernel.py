"""Add the slots of a batch to the sums of their canvases, in the order of the slots, without a race.

Each pixel of a canvas is owned by the first slot of the launch that covers it. The owner's program adds the
weighted values of all slots that cover the pixel, in their order, and no other program touches the pixel.
Compiled without fused multiply-add (`fp_fusion=False`), the sums equal those of `moesr.runtime.devices.host`
to the last bit.
"""

import triton
import triton.language as tl

SLOT_COLUMNS = tl.constexpr(7)
"""Columns of the int64 table [slots, 7]: addresses of the canvas' sums (0: an empty slot), of its sum of
weights and of its int32 flag; plane and row strides in elements; y and x of the tile on the canvas."""

_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def tile_blend(slots, tiles, weights, height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Grid: (blocks of a tile, channels, slots).

    `tiles` is [slots, C, height, width] and `weights` [height, width]. The sums of a canvas are float32 [C,
    H, W], its sum of weights is float32 [H, W]. Bit 0 of the canvas' flag is set if one of its tiles holds a
    value that is not finite.
    """
    channel, channels, slot = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    count = tl.num_programs(2)
    blocks_w = tl.cdiv(width, BLOCK_W)
    top = (tl.program_id(0) // blocks_w) * BLOCK_H
    left = (tl.program_id(0) % blocks_w) * BLOCK_W
    row = slots + slot * SLOT_COLUMNS
    sums = tl.load(row)
    if sums != 0:
        y_0, x_0 = tl.load(row + 5), tl.load(row + 6)
        y = tl.arange(0, BLOCK_H)[:, None] + top + y_0  # on the canvas
        x = tl.arange(0, BLOCK_W)[None, :] + left + x_0
        owned = (y < y_0 + height) & (x < x_0 + width)
        earlier = slot * 0
        while earlier < slot:
            other = slots + earlier * SLOT_COLUMNS
            if tl.load(other) == sums:
                dy, dx = y - tl.load(other + 5), x - tl.load(other + 6)
                owned = owned & ~((dy >= 0) & (dy < height) & (dx >= 0) & (dx < width))
            earlier += 1

        offset = y * tl.load(row + 4) + x
        canvas = sums.to(tl.pointer_type(tl.float32)) + channel * tl.load(row + 3) + offset
        total = tl.load(canvas, mask=owned, other=0.0)
        weight_sum = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.float32)) + offset, mask=owned, other=1.0)
        bad = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
        later = slot
        while later < count:
            other = slots + later * SLOT_COLUMNS
            y_1, x_1 = tl.load(other + 5), tl.load(other + 6)
            meets = (tl.load(other) == sums) & (y_1 < y_0 + top + BLOCK_H) & (y_1 + height > y_0 + top)
            if meets & (x_1 < x_0 + left + BLOCK_W) & (x_1 + width > x_0 + left):
                dy, dx = y - y_1, x - x_1
                covered = owned & (dy >= 0) & (dy < height) & (dx >= 0) & (dx < width)
                tile = tiles + (later * channels + channel).to(tl.int64) * height * width
                value = tl.load(tile + dy * width + dx, mask=covered, other=0.0).to(tl.float32)
                weight = tl.load(weights + dy * width + dx, mask=covered, other=0.0)
                total = tl.where(covered, total + value * tl.div_rn(weight, weight_sum), total)
                bad = bad | (~(tl.abs(value) <= _LARGEST)).to(tl.int32)
            later += 1
        tl.store(canvas, total, mask=owned)
        if tl.max(bad) > 0:
            tl.atomic_or(tl.load(row + 2).to(tl.pointer_type(tl.int32)), 1, sem="relaxed")
