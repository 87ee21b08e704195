"""Flat regions of an image, whose level a color correction must not change.

A scanned page is mostly paper at one level. To match the mean and deviation of the whole image would turn
white paper grey, because the text is sharper than in the enlarged input and its deviation larger. Clipped
values also say nothing about the color beyond the limit, so they are excluded from the statistics.

The enlarged input is divided into cells of 4x4 pixels, which are examined in squares of 3x3 cells:

- Regions of white or black, and flat ones close to them, are *pinned*: the result is the enlarged input.
- All regions close to white or black are left out of the statistics, also if they are noisy like a scan.
- These, and flat areas of any other level, are *steady*: the result keeps the input's local mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CELL_PX = 4
LEVEL = 2.0 / 255.0  # one level of 8 bits, where the range is [-1, 1]
CLIPPED = 2 * LEVEL  # from white or black, at most
_CLOSE = 16 * LEVEL  # from white or black: pinned if the values differ by `_FLAT` at most
_FLAT = 2.5 * LEVEL
_NEAR = 32 * LEVEL  # from white or black: steady if the values differ by `_NOISY` at most
_NOISY = 8.5 * LEVEL
_EVEN = 1.5 * LEVEL  # any values that differ by no more are steady
_FADE_CELLS = 8  # outside a steady region, the correction grows to its full size over this distance
_ROWS_PER_BLOCK = 64 * CELL_PX


@dataclass(frozen=True, eq=False)
class Regions:
    """The flat regions of a plane: bool [ceil(H / 4), ceil(W / 4)] each, one value per cell."""

    pinned: np.ndarray
    near: np.ndarray  # takes no part in the statistics; includes `pinned`
    steady: np.ndarray  # includes `near`

    @property
    def without_steady(self) -> Regions:
        """Only the pinned regions."""
        return Regions(self.pinned, self.pinned, self.pinned)


def find(plane: np.ndarray) -> Regions | None:
    """Return the flat regions of an enlarged input [H, W] in [-1, 1]; None if there are none."""
    low, high = _extremes(plane)
    lowest, highest = _around(low, np.minimum), _around(high, np.maximum)
    spread = highest - lowest
    pinned = _clipped(low, high)
    pinned |= _grown((spread <= _FLAT) & _within(lowest, highest, _CLOSE))
    near = pinned | _grown((spread <= _NOISY) & _within(lowest, highest, _NEAR))
    steady = near | _grown(spread <= _EVEN)
    return Regions(pinned, near, steady) if steady.any() else None


def find_clipped(plane: np.ndarray) -> Regions | None:
    """Return the white and black regions of an enlarged input [H, W] in [-1, 1]; None if there are none."""
    cells = _clipped(*_extremes(plane))
    return Regions(cells, cells, cells) if cells.any() else None


def expand(cells: np.ndarray, rows: slice, width: int) -> np.ndarray:
    """Return the value of each pixel's cell, [h, w] -> [rows, width].

    `rows` begins at a multiple of `CELL_PX`.
    """
    part = cells[rows.start // CELL_PX : -(-rows.stop // CELL_PX)]
    return part.repeat(CELL_PX, axis=0)[: rows.stop - rows.start].repeat(CELL_PX, axis=1)[:, :width]


class Protection:
    """Keeps the level of flat regions while an image is corrected."""

    def __init__(self, regions: Regions, content: np.ndarray, style: np.ndarray) -> None:
        """`content` [H, W] is to be corrected towards `style`, the enlarged input, which has the regions."""
        self._content, self._style, self._width = content, style, content.shape[1]
        self._free = _distance(_grown(regions.steady), _FADE_CELLS)
        self._pinned = regions.pinned.astype(np.float32)
        self._difference = _spread(_differences(style, content), regions.steady)

    def apply(self, rows: slice, correction: np.ndarray, out: np.ndarray) -> None:
        """Write `rows` of the content plus the correction, as far as it is allowed, to `out`.

        `correction` is [rows, W] and is changed. `out` is a whole image [H, W] and may be the content, since
        each pixel is read before it is written. In steady regions the difference of the local means is the
        correction; pinned regions become the style.
        """
        free = self._interpolated(self._free, rows)
        correction *= free
        correction += self._interpolated(self._difference, rows) * (1 - free)
        correction += self._content[rows]
        self._pin(rows, correction, out)

    def pin(self, rows: slice, out: np.ndarray) -> None:
        """Write `rows` of the content without any correction, with pinned regions of the style, to `out`."""
        self._pin(rows, self._content[rows].copy(), out)

    def _pin(self, rows: slice, result: np.ndarray, out: np.ndarray) -> None:
        # From the edge of a pinned cell to its center the result changes to the input; outside it does not.
        pinned = np.maximum(2 * self._interpolated(self._pinned, rows) - 1, 0)
        np.add(result, (self._style[rows] - result) * pinned, out=out[rows])

    def _interpolated(self, cells: np.ndarray, rows: slice) -> np.ndarray:
        """Return float32 [rows, W], values at the centers of cells with linear interpolation between them."""
        top, below, part = _neighbours(np.arange(rows.start, rows.stop), len(cells))
        lines = cells[top] * (1 - part[:, None]) + cells[below] * part[:, None]
        left, right, part = _neighbours(np.arange(self._width), cells.shape[1])
        return lines[:, left] * (1 - part) + lines[:, right] * part


def _blocks(plane: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield blocks of rows, with the first row of each cell in a block and the first column of each cell."""
    columns = np.arange(0, plane.shape[1], CELL_PX)
    for start in range(0, len(plane), _ROWS_PER_BLOCK):
        rows = slice(start, min(start + _ROWS_PER_BLOCK, len(plane)))
        yield rows, np.arange(0, rows.stop - rows.start, CELL_PX), columns


def _extremes(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest value in each cell: [h, w] each."""
    found: list[list[np.ndarray]] = [[], []]
    for rows, first, columns in _blocks(plane):
        for values, reduce in zip(found, (np.minimum.reduceat, np.maximum.reduceat), strict=True):
            values.append(reduce(reduce(plane[rows], first, axis=0), columns, axis=1))
    return np.concatenate(found[0]), np.concatenate(found[1])


def _differences(style: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Return the mean of `style - content` in each cell: float32 [h, w]."""
    parts = []
    for rows, first, columns in _blocks(style):
        difference = style[rows] - content[rows]
        total = np.add.reduceat(np.add.reduceat(difference, first, axis=0), columns, axis=1)
        heights = np.diff(np.append(first, len(difference)))
        widths = np.diff(np.append(columns, style.shape[1]))
        parts.append(total / np.outer(heights, widths).astype(np.float32))
    return np.concatenate(parts)


def _clipped(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the cells of white and of black that belong to squares of 3x3 such cells."""
    regions = low >= 1.0 - CLIPPED, high <= CLIPPED - 1.0
    return np.logical_or(*(_grown(_shrunk(region)) & region for region in regions))


def _within(low: np.ndarray, high: np.ndarray, distance: float) -> np.ndarray:
    """Return whether all values between `low` and `high` lie within a distance of white, or of black."""
    return (low >= 1.0 - distance) | (high <= distance - 1.0)


def _spread(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the known cells' means over 3x3 of them, extended to the cells around them; 0 elsewhere."""
    weights = known.astype(np.float32)
    values = np.where(known, _sum(values * weights) / np.maximum(_sum(weights), 1), 0)
    for _ in range(_FADE_CELLS + 2):
        count = _sum(weights)
        new = (count > 0) & (weights == 0)
        values = np.where(new, _sum(values) / np.maximum(count, 1), values)
        weights[new] = 1
    return values.astype(np.float32)


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


def _sum(values: np.ndarray) -> np.ndarray:
    """Return the sum of each cell and its eight neighbors."""
    return _around(values, np.add, mode="constant")


def _grown(cells: np.ndarray) -> np.ndarray:
    """Return the cells together with their eight neighbors."""
    return _around(cells, np.logical_or)


def _shrunk(cells: np.ndarray) -> np.ndarray:
    """Return the cells whose eight neighbors are all in the region.

    Cells beyond the image count as inside.
    """
    return ~_grown(~cells)


def _around(values: np.ndarray, combine: np.ufunc, mode: str = "edge") -> np.ndarray:
    """Return each cell combined with its eight neighbors."""
    for axis in (0, 1):
        padded = np.pad(values, [(1, 1) if axis == a else (0, 0) for a in (0, 1)], mode)  # type: ignore[arg-type]
        values = combine.reduce([_cut(padded, axis, i, values.shape[axis]) for i in range(3)])
    return values


def _cut(array: np.ndarray, axis: int, start: int, length: int) -> np.ndarray:
    return array[start : start + length] if axis == 0 else array[:, start : start + length]
