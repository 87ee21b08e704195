"""`moesr::tile_blend` for PyTorch; it changes its arguments in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesr.kernels.dispatch import has_kernels, plan_for
from moesr.kernels.launch import launch
from moesr.kernels.tile_blend import reference
from moesr.kernels.tile_blend.op import OP, table


@torch.library.custom_op("moesr::tile_blend", mutates_args=("sums", "flags"))
def tile_blend(
    sums: Sequence[Tensor],
    flags: Tensor,
    weight_sums: Sequence[Tensor],
    tiles: Tensor,
    weights: Tensor,
    slots: Tensor,
) -> None:
    """Add weighted tiles [slots, C, h, w] to the float32 sums [C, H, W] of canvases, in the order of slots.

    The weight of a pixel is `weights` [h, w] over the `weight_sums` [H, W] of the canvas. `flags`, int32
    [canvases], becomes 1 for a canvas with a tile that is not finite. A row of `slots`, int64 [slots, 3] on
    the CPU, holds the index of the canvas (negative: skip), y and x. ValueError is raised if a tile leaves
    its canvas.
    """
    height, width = weights.shape
    for index, y, x in slots.tolist():
        rows, columns = weight_sums[max(index, 0)].shape
        if index >= 0 and not (0 <= y <= rows - height and 0 <= x <= columns - width):
            raise ValueError(f"the {height}x{width} tile at {(y, x)} leaves the canvas of {rows}x{columns}")
    if not has_kernels(tiles):
        added, found = reference.tile_blend(sums, weight_sums, tiles, weights, slots.tolist())
        for canvas, value in zip(sums, added, strict=True):
            canvas.copy_(value)
        flags.bitwise_or_(found)
        return
    shape = {"slots": len(slots), "channels": tiles.shape[1], "height": height, "width": width}
    rows = table(list(sums), list(weight_sums), flags, slots.tolist()).to(tiles.device)
    buffers = {"slots": rows, "tiles": tiles.contiguous(), "weights": weights.contiguous()}
    launch(OP, plan_for(OP, shape, tiles.dtype, tiles.device), buffers)


@tile_blend.register_fake
def _(
    sums: Sequence[Tensor],
    flags: Tensor,
    weight_sums: Sequence[Tensor],
    tiles: Tensor,
    weights: Tensor,
    slots: Tensor,
) -> None:
    return None
