"""Overlapping tiles over a canvas of any size, and their blending.

Sampling aggregates the tiles' predictions at every step with Gaussian weights (StableSR, Section 3.3, Eq. 7);
decoding blends the tiles' pixels once, with raised-cosine ramps over the overlap. Both are weighted means:
`canvas = sum_n w_n / w_hat * tile_n` with `w_hat = sum_n w_n`, which leaves agreeing tiles as they are and
gives pixels that only one tile covers (the image's border among them) that tile's value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GAUSSIAN_VARIANCE = 0.01  # in squared tile widths, the value of the mixture of diffusers (Jiménez, 2023)


def tile_origins(size: int, tile: int, overlap: int, *, strided: bool = False) -> list[int]:
    """First positions of the fewest tiles that cover [0, size) with neighbours sharing at least `overlap`.

    Tiles are inside; the first starts at 0, the last ends at `size`. They are evenly spaced, or where
    `strided` share exactly `overlap` but for the last. Raises ValueError where `size < tile` (pad first) or
    not 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"the overlap must be at least 0 and smaller than the tile of {tile}, got {overlap}")
    if size < tile:
        raise ValueError(f"a canvas of {size} is smaller than a tile of {tile}; pad it first (reflect_pad)")
    spare = size - tile
    gaps = -(-spare // (tile - overlap))
    if strided:
        return [min(i * (tile - overlap), spare) for i in range(gaps + 1)]
    return [i * spare // max(gaps, 1) for i in range(gaps + 1)]


def grid(height: int, width: int, tile: int, overlap: int, *, strided: bool = False) -> list[tuple[int, int]]:
    """Origins (y, x) of the tiles that cover a canvas, row by row."""
    rows, columns = (tile_origins(size, tile, overlap, strided=strided) for size in (height, width))
    return [(y, x) for y in rows for x in columns]


def gaussian_weights(tile: int, lowered: float = 0.0) -> np.ndarray:
    """Weights for aggregation at every step: float32 [tile, tile], peak 1.

    The variance is 0.01 squared tile widths. The corners of a large tile get exp(-25), about 1e-11: small,
    but never 0 in float32. `lowered`: pixels by which the centre lies below the middle.
    """
    offset = (np.arange(tile) - (tile - 1) / 2) / tile
    column, row = (np.exp(-(d**2) / (2.0 * _GAUSSIAN_VARIANCE)) for d in (offset - lowered / tile, offset))
    weights = np.outer(column, row)
    return (weights / weights.max()).astype(np.float32)


def feather_weights(tile: int, overlap: int) -> np.ndarray:
    """Weights for blending decoded pixels: float32 [tile, tile], in (0, 1].

    1 inside, falling to the edges over `overlap` as a raised cosine; tiles that overlap by exactly that much
    have weights that sum to 1. Raises ValueError unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"the overlap must be at least 0 and smaller than the tile of {tile}, got {overlap}")
    ramp = np.ones(tile)
    ramp[:overlap] = 0.5 - 0.5 * np.cos(np.pi * np.arange(1, overlap + 1) / (overlap + 1))
    profile = np.minimum(ramp, ramp[::-1])
    return np.outer(profile, profile).astype(np.float32)


def weight_sum(
    height: int, width: int, origins: Sequence[tuple[int, int]], weights: np.ndarray
) -> np.ndarray:
    """Sum of the weights of all tiles at each place of a canvas, by which a mean divides: float32 [H, W].

    `weights` float32 [tile, tile], positive. Raises ValueError where the tiles leave the canvas or do not
    cover it.
    """
    tile = len(weights)
    if weights.shape != (tile, tile):
        raise ValueError(f"weights must be square, got {weights.shape}")
    total = np.zeros((height, width), np.float32)
    for y, x in origins:
        if not (0 <= y <= height - tile and 0 <= x <= width - tile):
            raise ValueError(f"the tile of {tile} at {(y, x)} leaves the canvas of {height}x{width}")
        total[y : y + tile, x : x + tile] += weights
    if not total.all():
        raise ValueError(f"{len(origins)} tiles of {tile} do not cover the canvas of {height}x{width}")
    return total
