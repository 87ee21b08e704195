"""Color correction in NumPy: the methods of `fix_color`, with regions of white and black protected."""

from __future__ import annotations

import numpy as np

from moesr.runtime.images.color import wavelet
from moesr.runtime.images.planes import to_unit

CELL_PX, FADE_CELLS = 4, 8
METHODS = {"none": 0, "adain": 1, "wavelet": 2}
_VARIANCE_EPS = 1e-5
_CLIPPED = 1.0 - 4.0 / 255.0


def image_color(content: np.ndarray, style: np.ndarray, method: str) -> np.ndarray:
    """Correct `content` float32 [3, H, W] towards `style` [H, W, 3] of uint8 or uint16.

    Clipped regions take no part in the statistics or the difference, and the result is the style there.
    """
    planes = style.transpose(2, 0, 1)
    target = to_unit(planes, np.empty(planes.shape, np.float32))
    out = np.empty_like(content)
    for c, plane in enumerate(content):
        regions = clipped_cells(target[c])
        inside = expand(regions, plane.shape)
        correction = np.zeros_like(plane)
        if method == "wavelet":
            correction = wavelet(plane, np.where(inside, plane, target[c])) - plane
        elif method == "adain":
            factor, offset = gain_and_offset(plane[~inside], target[c][~inside])
            correction = plane * np.float32(factor - 1) + np.float32(offset)
        out[c] = protected(plane, correction, target[c], regions, fade(regions))
    return out


def gain_and_offset(content: np.ndarray, style: np.ndarray) -> tuple[float, float]:
    """Return the factor and offset that give values [N] the mean and the deviation of others."""
    means, deviations = [], []
    for values in (content.astype(np.float64), style.astype(np.float64)):
        means.append(values.sum() / max(values.size, 1))
        squares = ((values - means[-1]) ** 2).sum()
        deviations.append(np.sqrt(squares / max(values.size - 1, 1) + _VARIANCE_EPS))
    factor = deviations[1] / deviations[0]
    return factor, means[1] - means[0] * factor


def protected(
    content: np.ndarray, correction: np.ndarray, style: np.ndarray, regions: np.ndarray, free: np.ndarray
) -> np.ndarray:
    """Return [H, W] plus a correction where cells are `free`, and the style in clipped `regions`."""
    value = correction * interpolated(free, content.shape) + content
    pinned = np.maximum(2 * interpolated(regions.astype(np.float32), content.shape) - 1, 0)
    return value + (style - value) * pinned


def clipped_cells(plane: np.ndarray) -> np.ndarray:
    """Return the cells of white, and of black, that belong to squares of 3x3 such cells: bool [h, w]."""
    return regions_of(flags_of(plane))


def flags_of(plane: np.ndarray) -> np.ndarray:
    """Return bit 0 for each cell of white and bit 1 for each of black: uint8 [ceil(H / 4), ceil(W / 4)]."""
    rows, columns = (np.arange(0, size, CELL_PX) for size in plane.shape)
    low, high = (
        reduce.reduceat(reduce.reduceat(plane, rows, axis=0), columns, axis=1)
        for reduce in (np.minimum, np.maximum)
    )
    return ((low >= _CLIPPED) + 2 * (high <= -_CLIPPED)).astype(np.uint8)


def regions_of(flags: np.ndarray) -> np.ndarray:
    """Return the flagged cells that belong to squares of 3x3 cells with the same flag."""
    found = np.zeros(flags.shape, bool)
    for bit in (1, 2):
        region = (flags & bit) != 0
        found |= grown(~grown(~region)) & region  # cells beyond the image count as inside
    return found


def fade(regions: np.ndarray) -> np.ndarray:
    """Return 0 in and beside clipped cells, growing to 1 over FADE_CELLS: float32 [h, w]."""
    total, cells = np.zeros(regions.shape, np.float32), grown(regions)
    for _ in range(FADE_CELLS):
        total += ~cells
        cells = grown(cells)
    return total / np.float32(FADE_CELLS)


def grown(cells: np.ndarray) -> np.ndarray:
    """Return the cells together with their eight neighbors."""
    padded = np.pad(cells, 1)
    height, width = cells.shape
    return np.logical_or.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


def expand(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the value of each pixel's cell: [h, w] -> [H, W]."""
    return cells.repeat(CELL_PX, axis=0).repeat(CELL_PX, axis=1)[: shape[0], : shape[1]]


def interpolated(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 [H, W], values at the centers of cells with linear interpolation between them."""
    (top, below, down), (left, right, along) = (
        _neighbors(np.arange(size), count) for size, count in zip(shape, cells.shape, strict=True)
    )
    lines = cells[top] * (1 - down[:, None]) + cells[below] * down[:, None]
    return lines[:, left] * (1 - along) + lines[:, right] * along


def _neighbors(position: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    place = np.clip((position + 0.5) / CELL_PX - 0.5, 0, count - 1)
    first = place.astype(np.intp)
    return first, np.minimum(first + 1, count - 1), (place - first).astype(np.float32)
