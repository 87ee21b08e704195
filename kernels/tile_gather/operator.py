"""`moesr::tile_gather` for PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesr.kernels.dispatch import has_kernels, plan_for
from moesr.kernels.launch import launch
from moesr.kernels.tile_gather import reference
from moesr.kernels.tile_gather.op import OP, table


@torch.library.custom_op("moesr::tile_gather", mutates_args=())
def tile_gather(
    canvases: Sequence[Tensor], slots: Tensor, height: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return windows of canvases as tiles [slots, C, height, width] in `dtype`, and float32 t [slots].

    Canvases are float32 [C, H, W], or all uint8 or all uint16 [H, W, C], which are mapped to [-1, 1]. A row
    of `slots`, int64 [slots, 4] on the CPU, holds the index of the canvas (negative: zeros), y, x and t.
    ValueError is raised if a window leaves its canvas.
    """
    for index, y, x, _ in slots.tolist():
        rows, columns = _sides(canvases[max(index, 0)])
        if index >= 0 and not (0 <= y <= rows - height and 0 <= x <= columns - width):
            raise ValueError(f"the {height}x{width} tile at {(y, x)} leaves the canvas of {rows}x{columns}")
    first = canvases[0]
    if not has_kernels(first):
        return reference.tile_gather(canvases, slots.tolist(), height, width, dtype)
    shape = {
        "slots": len(slots), "channels": _channels(first), "height": height, "width": width,
        "pixel_bytes": first.element_size(),
    }  # fmt: skip
    tiles = first.new_empty(len(slots), shape["channels"], height, width, dtype=dtype)
    t = first.new_empty(len(slots), dtype=torch.float32)
    rows = table(list(canvases), slots).to(first.device)
    launch(OP, plan_for(OP, shape, dtype, first.device), {"slots": rows, "tiles": tiles, "t": t})
    return tiles, t


@tile_gather.register_fake
def _(
    canvases: Sequence[Tensor], slots: Tensor, height: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first = canvases[0]
    tiles = first.new_empty(len(slots), _channels(first), height, width, dtype=dtype)
    return tiles, first.new_empty(len(slots), dtype=torch.float32)


def _sides(canvas: Tensor) -> tuple[int, int]:
    rows, columns = canvas.shape[1:] if canvas.is_floating_point() else canvas.shape[:2]
    return rows, columns


def _channels(canvas: Tensor) -> int:
    return canvas.shape[0] if canvas.is_floating_point() else canvas.shape[2]
