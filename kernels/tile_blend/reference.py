"""Adds weighted tiles one after another, as `moesr.runtime.devices.host` does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Slot = tuple[int, int, int]
"""Index of the canvas (negative: an empty slot), y, x."""


def tile_blend(
    sums: Sequence[Tensor],
    weight_sums: Sequence[Tensor],
    tiles: Tensor,
    weights: Tensor,
    slots: Sequence[Slot],
) -> tuple[list[Tensor], Tensor]:
    """Return the new sums, each [C, H, W], and int32 flags [canvases].

    A flag is 1 if a tile of its canvas is not finite. Each of `weight_sums` is [H, W], `tiles` is
    [slots, C, h, w] and `weights` is [h, w].
    """
    sums = [canvas.clone() for canvas in sums]
    flags = torch.zeros(len(sums), dtype=torch.int32, device=tiles.device)
    height, width = weights.shape
    for tile, (index, y, x) in zip(tiles, slots, strict=True):
        if index < 0:
            continue
        rows, columns = slice(y, y + height), slice(x, x + width)
        sums[index][:, rows, columns] += tile.to(weights.dtype) * (
            weights / weight_sums[index][rows, columns]
        )
        flags[index] |= (~tile.isfinite().all()).int()
    return sums, flags
