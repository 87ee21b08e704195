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
_ONE = np.float32(1.0)
_FADE_CELLS = 8  # outside a steady region, the correction grows to its full size over this distance


@dataclass(frozen=True, eq=False)
class Regions:
    """The flat regions of a plane, with one value per cell: bool [ceil(H / 4), ceil(W / 4)] each.

    `differences` (float32) are the means of `style - content` in all cells.
    """

    pinned: np.ndarray
    near: np.ndarray  # left out of the statistics; includes `pinned`
    steady: np.ndarray  # includes `near`
    differences: np.ndarray

    @property
    def without_steady(self) -> Regions:
        """Only the pinned regions."""
        return Regions(self.pinned, self.pinned, self.pinned, self.differences)


class Search:
    """Finds the flat regions of an enlarged input, the style, which is passed in blocks of rows."""

    def __init__(self) -> None:
        self._parts: tuple[list[np.ndarray], ...] = ([], [], [])

    def add(self, style: np.ndarray, content: np.ndarray) -> None:
        """Add the next rows of the style and of the image to be corrected: [rows, W] in [-1, 1].

        The number of rows is a multiple of `CELL_PX`, except in the last block.
        """
        rows, columns = np.arange(0, len(style), CELL_PX), np.arange(0, style.shape[1], CELL_PX)

        def reduced(values: np.ndarray, how: np.ufunc) -> np.ndarray:
            return how.reduceat(how.reduceat(values, rows, axis=0), columns, axis=1)

        heights, widths = np.diff(np.append(rows, len(style))), np.diff(np.append(columns, style.shape[1]))
        mean = reduced(style - content, np.add) / np.outer(heights, widths).astype(np.float32)
        found = reduced(style, np.minimum), reduced(style, np.maximum), mean
        for parts, values in zip(self._parts, found, strict=True):
            parts.append(values)

    def _taken(self) -> list[np.ndarray]:
        """Return the values of all rows so far, and keep them no longer: large images have many."""
        taken = []
        for parts in self._parts:
            taken.append(np.concatenate(parts))
            parts.clear()
        return taken

    def clipped(self) -> Regions | None:
        """Return the white and black regions of the rows so far, once; None if there are none."""
        low, high, differences = self._taken()
        cells = _clipped(low, high)
        return Regions(cells, cells, cells, differences) if cells.any() else None

    def flat(self) -> Regions | None:
        """Return all flat regions of the rows so far, once; None if there are none."""
        low, high, differences = self._taken()
        lowest, highest = _around(low, np.minimum), _around(high, np.maximum)
        spread = highest - lowest
        pinned = _clipped(low, high)
        pinned |= _grown((spread <= _FLAT) & _within(lowest, highest, _CLOSE))
        near = pinned | _grown((spread <= _NOISY) & _within(lowest, highest, _NEAR))
        steady = near | _grown(spread <= _EVEN)
        return Regions(pinned, near, steady, differences) if steady.any() else None


def expand(cells: np.ndarray, rows: slice, width: int) -> np.ndarray:
    """Return the value of each pixel's cell, [h, w] -> [rows, width].

    `rows` begins at a multiple of `CELL_PX`.
    """
    part = cells[rows.start // CELL_PX : -(-rows.stop // CELL_PX)]
    return part.repeat(CELL_PX, axis=0)[: rows.stop - rows.start].repeat(CELL_PX, axis=1)[:, :width]


class Protection:
    """Keeps the level of flat regions while an image is corrected, in blocks of rows."""

    def __init__(self, regions: Regions, width: int) -> None:
        self._width = width
        self._free = _distance(_grown(regions.steady), _FADE_CELLS)
        self._pinned = regions.pinned
        self._difference = _spread(regions.differences, regions.steady)

    def apply(
        self, rows: slice, content: np.ndarray, correction: np.ndarray, style: np.ndarray, out: np.ndarray
    ) -> None:
        """Write `content` plus the permitted share of the correction to `out`; `correction` is changed.

        All arrays are the `rows` of an image, [rows, W]; `out` may be `content`. In steady regions the
        correction is the difference of the local means; pinned regions become the style.
        """
        free = self._interpolated(self._free, rows, np.float32(_FADE_CELLS))
        correction *= free
        correction += self._interpolated(self._difference, rows) * (1 - free)
        correction += content
        self.pin(rows, correction, style, out)

    def pin(self, rows: slice, content: np.ndarray, style: np.ndarray, out: np.ndarray) -> None:
        """Write `content`, with pinned regions of the style, to `out`; arrays as for `apply`."""
        # From the edge of a pinned cell to its center the result changes to the input; outside it does not.
        pinned = np.maximum(2 * self._interpolated(self._pinned, rows) - 1, 0)
        np.add(content, (style - content) * pinned, out=out)

    def _interpolated(self, cells: np.ndarray, rows: slice, unit: np.float32 = _ONE) -> np.ndarray:
        """Return float32 [rows, W], values at the centers of cells with linear interpolation between them.

        The value of a cell is counted in `unit`.
        """
        top, below, part = _neighbours(np.arange(rows.start, rows.stop), len(cells))
        lines = cells[top] / unit * (1 - part[:, None]) + cells[below] / unit * part[:, None]
        left, right, part = _neighbours(np.arange(self._width), cells.shape[1])
        return lines[:, left] * (1 - part) + lines[:, right] * part


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
    """Return the distance in cells from the region, 0 inside it and at most `limit`, as uint8."""
    total = np.zeros(cells.shape, np.uint8)
    for _ in range(limit):
        total += ~cells
        cells = _grown(cells)
    return total


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
