"""Regions of flat white or black, which a color correction must not change.

A scanned page is mostly paper at 255. To match the mean and deviation of the whole image would turn that
paper grey, because the text is sharper than in the enlarged input and its deviation larger. Clipped values
also say nothing about the color beyond the limit, so they are excluded from the statistics.

The enlarged input is divided into cells of 4x4 pixels. A cell is clipped if all its pixels are within two of
255 levels of white (or of black), and if it belongs to a square of 3x3 such cells.
"""

from __future__ import annotations

import numpy as np

CELL_PX = 4
TOLERANCE = 2 * 2.0 / 255.0  # two levels of 8 bits, for a range of [-1, 1]
_FADE_CELLS = 8  # outside a clipped region, the correction grows to its full size over this distance
_ROWS_PER_BLOCK = 64 * CELL_PX


def clipped_cells(plane: np.ndarray) -> np.ndarray | None:
    """Return the clipped cells of an enlarged input [H, W] in [-1, 1]: bool [ceil(H / 4), ceil(W / 4)].

    The result is None if there are none.
    """
    columns = np.arange(0, plane.shape[1], CELL_PX)
    white, black = [], []
    for start in range(0, len(plane), _ROWS_PER_BLOCK):
        block = plane[start : start + _ROWS_PER_BLOCK]
        rows = np.arange(0, len(block), CELL_PX)
        low = np.minimum.reduceat(np.minimum.reduceat(block, rows, axis=0), columns, axis=1)
        high = np.maximum.reduceat(np.maximum.reduceat(block, rows, axis=0), columns, axis=1)
        white.append(low >= 1.0 - TOLERANCE)
        black.append(high <= TOLERANCE - 1.0)
    regions = [np.concatenate(parts) for parts in (white, black)]
    cells = np.logical_or(*(_grown(_shrunk(region)) & region for region in regions))
    return cells if cells.any() else None


def expand(cells: np.ndarray, rows: slice, width: int) -> np.ndarray:
    """Return the value of each pixel's cell, [h, w] -> [rows, width].

    `rows` begins at a multiple of `CELL_PX`.
    """
    part = cells[rows.start // CELL_PX : -(-rows.stop // CELL_PX)]
    return part.repeat(CELL_PX, axis=0)[: rows.stop - rows.start].repeat(CELL_PX, axis=1)[:, :width]


class Protection:
    """For each pixel, its share of the correction, and how far it is replaced by the input's value."""

    def __init__(self, cells: np.ndarray, shape: tuple[int, ...]) -> None:
        """Compute both from `cells` [h, w], the clipped cells of an image of `shape` [H, W]."""
        self._cells, (self._height, self._width) = cells, shape
        self._free = _distance(_grown(cells), _FADE_CELLS)
        self._pinned = cells.astype(np.float32)

    def clipped(self, rows: slice) -> np.ndarray:
        """Return which pixels of `rows` are clipped: bool [rows, W]."""
        return expand(self._cells, rows, self._width)

    def apply(
        self, rows: slice, content: np.ndarray, correction: np.ndarray, style: np.ndarray, out: np.ndarray
    ) -> None:
        """Write `rows` of `content` plus the permitted share of the correction to `out`.

        `correction` is changed. `content`, `style` and `out` are whole images [H, W], `correction` is [rows,
        W]. `out` may be `content`.
        """
        correction *= self._interpolated(self._free, rows)
        correction += content[rows]
        # From the edge of a clipped cell to its center the result changes to the input; outside it does not.
        pinned = np.maximum(2 * self._interpolated(self._pinned, rows) - 1, 0)
        np.add(correction, (style[rows] - correction) * pinned, out=out[rows])

    def _interpolated(self, cells: np.ndarray, rows: slice) -> np.ndarray:
        """Return float32 [rows, W], values at the centers of cells with linear interpolation between them."""
        top, below, part = _neighbours(np.arange(rows.start, rows.stop), len(cells))
        lines = cells[top] * (1 - part[:, None]) + cells[below] * part[:, None]
        left, right, part = _neighbours(np.arange(self._width), cells.shape[1])
        return lines[:, left] * (1 - part) + lines[:, right] * part


def _neighbours(position: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the two cells whose centers surround each pixel, and the weight of the second one."""
    place = np.clip((position + 0.5) / CELL_PX - 0.5, 0, count - 1)
    first = place.astype(np.intp)
    return first, np.minimum(first + 1, count - 1), (place - first).astype(np.float32)


def _distance(cells: np.ndarray, limit: int) -> np.ndarray:
    """Return 0 inside the cells, growing to 1 at a distance of `limit` cells, as float32."""
    total = np.zeros(cells.shape, np.float32)
    for _ in range(limit):
        total += ~cells
        cells = _grown(cells)
    return total / limit


def _grown(cells: np.ndarray) -> np.ndarray:
    """Return the cells together with their eight neighbors."""
    for axis in (0, 1):
        padded = np.pad(cells, [(1, 1) if axis == a else (0, 0) for a in (0, 1)])
        cells = np.logical_or.reduce([_cut(padded, axis, i, cells.shape[axis]) for i in range(3)])
    return cells


def _shrunk(cells: np.ndarray) -> np.ndarray:
    """Return the cells whose eight neighbors are all in the region.

    Cells beyond the image count as inside.
    """
    return ~_grown(~cells)


def _cut(array: np.ndarray, axis: int, start: int, length: int) -> np.ndarray:
    return array[start : start + length] if axis == 0 else array[:, start : start + length]
