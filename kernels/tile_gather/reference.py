"""Gathers tiles by slicing the canvases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Slot = tuple[int, int, int, int]
"""Index of the canvas (negative: an empty slot), y, x, t."""


def tile_gather(
    canvases: Sequence[Tensor], slots: Sequence[Slot], height: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return tiles [slots, C, height, width] in `dtype` and float32 t [slots]; empty slots are zeros.

    A canvas is floating point [C, H, W], or a uint8 or uint16 image [H, W, C], which is mapped to [-1, 1].
    """
    tiles, t = [], []
    for index, y, x, time in slots:
        canvas = canvases[max(index, 0)]
        if not canvas.is_floating_point():
            largest = torch.iinfo(canvas.dtype).max
            canvas = canvas.permute(2, 0, 1).to(torch.float32) * (2.0 / largest) - 1.0
        window = canvas[:, y : y + height, x : x + width]
        tiles.append(window if index >= 0 else torch.zeros_like(canvas[:, :height, :width]))
        t.append(time if index >= 0 else 0)
    return torch.stack(tiles).to(dtype), torch.tensor(t, dtype=torch.float32)
