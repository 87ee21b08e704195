"""Overlapping tiles over a canvas of any size, and how they are blended.

Sampling combines the tiles' predictions at every step, either with a wide overlap and Gaussian weights
(StableSR, Section 3.3, Eq. 7), or with a narrow overlap and a grid that moves from step to step, so that no
border of a tile stays in place (as in SpotDiffusion, Frolov et al., 2024, whose tiles do not overlap at all).
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


def shifted_origins(size: int, tile: int, overlap: int, room: int, phase: float) -> list[int]:
    """First positions of tiles whose inner borders move with `phase`, from 0 (right) to 1 (left).

    Tiles lie inside; the first starts at 0 and the last ends at `size`. Neighbors share at least `overlap`.
    The inner tiles can move together by at least `room`, whatever the size, and all phases have equally many
    tiles. Two tiles cannot move, so they share at least `overlap + room`. ValueError as for `tile_origins`.
    """
    tile_origins(size, tile, overlap)  # checks the arguments
    spare, stride = size - tile, tile - overlap
    gaps = -(-(spare + room) // stride) if spare else 0
    moved = int(phase * (gaps * stride - spare))
    inner = [min(max(i * stride - moved, 0), spare) for i in range(1, gaps)]
    return [0, *inner, spare] if gaps else [0]


def wrapped_origins(size: int, tile: int, overlap: int, phase: float = 0.0) -> list[int]:
    """First positions, in [0, size), of evenly spaced tiles on a circle of `size`; `phase` 1 is a full turn.

    Neighbors share at least `overlap`. A tile may reach past the end, where it goes on at 0, and may be
    larger than the circle. ValueError unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"the overlap must be at least 0 and smaller than the tile of {tile}, got {overlap}")
    count = -(-size // (tile - overlap))
    return sorted((i * size // count + int(phase * size)) % size for i in range(count))


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


def runs(start: int, length: int, size: int) -> list[tuple[slice, slice]]:
    """Cut positions `start` to `start + length` on a circle of `size` into runs that do not wrap around.

    Each run is a slice of the circle and the slice of the tile that lies there.
    """
    found, at = [], 0
    while at < length:
        begin = (start + at) % size
        count = min(size - begin, length - at)
        found.append((slice(begin, begin + count), slice(at, at + count)))
        at += count
    return found


def weight_sum(
    height: int,
    width: int,
    origins: Sequence[tuple[int, int]],
    weights: np.ndarray,
    *,
    wraps: bool = False,
) -> np.ndarray:
    """Return the sum of the weights of all tiles at each pixel, the divisor of the mean: float32 [H, W].

    `weights` are float32 [tile, tile], positive. If the canvas `wraps`, a tile that leaves it goes on at the
    opposite side. Otherwise a ValueError is raised if a tile leaves it, and always if the tiles do not cover
    it.
    """
    tile = len(weights)
    if weights.shape != (tile, tile):
        raise ValueError(f"weights must be square, got {weights.shape}")
    total = np.zeros((height, width), np.float32)
    for y, x in origins:
        if not wraps and not (0 <= y <= height - tile and 0 <= x <= width - tile):
            raise ValueError(f"the tile of {tile} at {(y, x)} leaves the canvas of {height}x{width}")
        for rows, of_rows in runs(y, tile, height):
            for columns, of_columns in runs(x, tile, width):
                total[rows, columns] += weights[of_rows, of_columns]
    if not total.all():
        raise ValueError(f"{len(origins)} tiles of {tile} do not cover the canvas of {height}x{width}")
    return total
