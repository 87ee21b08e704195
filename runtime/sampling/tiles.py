"""Overlapping tiles over a canvas of any size, and how they are blended.

Sampling combines the tiles' predictions at every step with Gaussian weights (StableSR, Section 3.3, Eq. 7).
Decoding blends the tiles' pixels once, with raised-cosine ramps over the overlap. Both are weighted means,
`canvas = sum_n w_n / w_hat * tile_n` with `w_hat = sum_n w_n`: if tiles agree, the mean equals them, and a
pixel that only one tile covers (as at the image's border) gets that tile's value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GAUSSIAN_VARIANCE = 0.01  # in squared tile widths; the value is that of Mixture of Diffusers (Jiménez, 2023)


def tile_origins(size: int, tile: int, overlap: int, *, strided: bool = False) -> list[int]:
    """Return the origins of the fewest tiles that cover [0, size) if neighbors share at least `overlap`.

    Tiles lie inside; the first starts at 0 and the last ends at `size`. They are evenly spaced; with
    `strided`, all but the last share exactly `overlap` with the previous tile. Raises ValueError if `size <
    tile` (pad first) or not 0 <= overlap < tile.
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
    """Return the origins (y, x) of the tiles that cover a canvas, row by row.

    ValueError as in `tile_origins`.
    """
    rows, columns = (tile_origins(size, tile, overlap, strided=strided) for size in (height, width))
    return [(y, x) for y in rows for x in columns]


def gaussian_weights(tile: int, lowered: float = 0.0) -> np.ndarray:
    """Return weights for combining tiles at every step: float32 [tile, tile], peak 1.

    The variance is 0.01 squared tile widths. The corners of a large tile get exp(-25), about 1e-11: small,
    but not 0 in float32. The center lies `lowered` pixels below the middle.
    """
    offset = (np.arange(tile) - (tile - 1) / 2) / tile
    column, row = (np.exp(-(d**2) / (2.0 * _GAUSSIAN_VARIANCE)) for d in (offset - lowered / tile, offset))
    weights = np.outer(column, row)
    return (weights / weights.max()).astype(np.float32)


def feather_weights(tile: int, overlap: int) -> np.ndarray:
    """Return weights for blending decoded pixels: float32 [tile, tile], in (0, 1].

    They are 1 inside and fall to the edges over `overlap` as a raised cosine, so that the weights of tiles
    that overlap by exactly that amount sum to 1. Raises ValueError unless 0 <= overlap < tile.
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
    """Return the sum of the weights of all tiles at each pixel, the divisor of the mean: float32 [H, W].

    `weights` are float32 [tile, tile], positive. Raises ValueError if a tile leaves the canvas or the tiles
    do not cover it.
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
