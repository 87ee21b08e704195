"""Copy windows of canvases into the slots of a batch; a table says where each canvas lies in memory.

Compiled without fused multiply-add (`fp_fusion=False`), the result equals the host's to the last bit.
"""

import triton
import triton.language as tl

SLOT_COLUMNS = tl.constexpr(6)
"""Columns of the int64 table [slots, 6]: address of the canvas (0: an empty slot), plane and row strides in
elements, y and x of the window, timestep t."""


@triton.jit
def tile_gather(
    slots,
    tiles,
    t,
    height,
    width,
    PIXEL_BYTES: tl.constexpr,
    WITH_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid: (blocks of a tile, channels, slots).

    `tiles` is [slots, C, height, width] of any floating-point type and `t` is [slots]. A canvas is float32
    [C, H, W] if `PIXEL_BYTES` is 4, and uint8 or uint16 [H, W, C] if it is 1 or 2. Empty slots become zeros.
    """
    channel, channels, slot = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    blocks_w = tl.cdiv(width, BLOCK_W)
    y = (tl.program_id(0) // blocks_w) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    x = (tl.program_id(0) % blocks_w) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    inside = (y < height) & (x < width)
    row = slots + slot * SLOT_COLUMNS
    address, plane, stride = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    from_y, from_x = y + tl.load(row + 3), x + tl.load(row + 4)
    read = (y < tl.where(address != 0, height, 0)) & (x < width)
    if PIXEL_BYTES == 4:
        canvas = address.to(tl.pointer_type(tl.float32)) + channel * plane
        value = tl.load(canvas + from_y * stride + from_x, mask=read, other=0.0)
    elif PIXEL_BYTES == 2:
        canvas = address.to(tl.pointer_type(tl.uint16)) + channel * plane
        pixel = tl.load(canvas + from_y * stride + from_x * channels, mask=read, other=0)
        value = tl.where(read, pixel.to(tl.float32) * (2.0 / 65535.0) - 1.0, 0.0)
    else:
        canvas = address.to(tl.pointer_type(tl.uint8)) + channel * plane
        pixel = tl.load(canvas + from_y * stride + from_x * channels, mask=read, other=0)
        value = tl.where(read, pixel.to(tl.float32) * (2.0 / 255.0) - 1.0, 0.0)
    tile = tiles + (slot * channels + channel).to(tl.int64) * height * width
    tl.store(tile + y * width + x, value.to(tiles.dtype.element_ty), mask=inside)
    if WITH_T and (tl.program_id(0) + channel == 0):
        tl.store(t + slot, tl.where(address != 0, tl.load(row + 5), 0).to(t.dtype.element_ty))
