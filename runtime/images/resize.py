"""Bicubic resizing as MATLAB's `imresize` does it, the convention of the super-resolution literature.

The kernel is Keys' cubic with a = -0.5. Pixel centers lie at integers from 1, so output u maps to `u /
scale + (1 - 1/scale) / 2`. Edges are mirrored, and the edge pixel is repeated. For a reduction with
antialiasing the kernel is stretched by 1/scale. The axis with the smaller scale is resized first, or the
rows if both scales are equal. Sums are in float64. As in the published pipeline, an integer image is
rounded (half to even) and clipped after *each* of the two passes. PyTorch's `interpolate` differs: its
kernel has a = -0.75, only the edge pixel is repeated, and nothing is rounded between the passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Convention = Literal["matlab", "torch"]

_A: dict[str, float] = {"matlab": -0.5, "torch": -0.75}  # parameter of Keys' kernel
_TYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
_BLOCK_BYTES = 32 << 20  # target size of the float64 intermediate of one block


@dataclass(frozen=True, eq=False)
class Taps:
    """The source positions of each output position and their weights, which sum to 1: both [out, taps]."""

    index: np.ndarray
    weight: np.ndarray

    def rows(self, start: int, stop: int) -> Taps:
        """Return the taps of a range of output positions."""
        return Taps(self.index[start:stop], self.weight[start:stop])

    def at(self, positions: np.ndarray) -> Taps:
        """Return the taps of these output positions."""
        return Taps(self.index[positions], self.weight[positions])

    def window(self) -> tuple[Taps, slice]:
        """Return the slice of the source that is used, and the taps with positions relative to its start."""
        first, last = int(self.index.min()), int(self.index.max())
        return Taps(self.index - first, self.weight), slice(first, last + 1)


def imresize(
    image: np.ndarray,
    height: int,
    width: int,
    *,
    antialias: bool = True,
    convention: Convention = "matlab",
) -> np.ndarray:
    """Resize an image, [H, W] or [H, W, C] of uint8, uint16 or float32, to `height` x `width`; same dtype.

    Integer images are rounded and clipped to the range of their type; float32 images are not. The source has
    at least 1x1 pixels. The work is done in blocks of rows, so memory beyond the output is bounded by the
    block size and a few source rows. Raises ValueError for another type or number of axes, or an empty size.
    """
    resizer = Resizer(image, height, width, antialias=antialias, convention=convention)
    return resizer.rows(0, height)


class Resizer:
    """An image of another size whose rows are computed on request, with the values of `imresize`."""

    def __init__(
        self,
        image: np.ndarray,
        height: int,
        width: int,
        *,
        antialias: bool = True,
        convention: Convention = "matlab",
    ) -> None:
        """ValueError as for `imresize`."""
        if image.dtype not in _TYPES or image.ndim not in (2, 3):
            raise ValueError(
                f"expected a uint8, uint16 or float32 image, HxW or HxWxC; got {image.dtype} {image.shape}"
            )
        if min(image.shape) < 1 or height < 1 or width < 1:
            raise ValueError(
                f"cannot resize an image of shape {image.shape} to {height}x{width}: sizes start at 1"
            )
        self.height, self.width = height, width
        self._extra = image.shape[2:]
        self._source = image.reshape(*image.shape[:2], -1)  # [H, W, C]
        in_height, in_width, channels = self._source.shape
        self._vertical, self._horizontal = (
            _taps(*sizes, antialias, convention) for sizes in ((in_height, height), (in_width, width))
        )
        self._rows_first = height * in_width <= width * in_height  # height / in_height <= width / in_width
        self._between = image.dtype if convention == "matlab" else np.dtype(np.float64)
        rows_per_block = max(1, _BLOCK_BYTES // (8 * channels * max(in_width, width)))
        # A reduction reads many source rows per output row, so the source rows should fill the block instead.
        self._rows_per_block = max(1, min(rows_per_block, math.ceil(rows_per_block * height / in_height)))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return the rows from `start` to before `stop`: [rows, W] or [rows, W, C]."""
        dtype = self._source.dtype
        out = np.empty((stop - start, self.width, self._source.shape[2]), dtype)
        for first in range(start, stop, self._rows_per_block):
            last = min(first + self._rows_per_block, stop)
            taps, needed = self._vertical.rows(first, last).window()
            block = self._source[needed]
            if self._rows_first:
                block = _quantise(_resample(block, taps), self._between)
                block = _resample_columns(block, self._horizontal)
            else:
                block = _quantise(_resample_columns(block, self._horizontal), self._between)
                block = _resample(block, taps)
            out[first - start : last - start] = _quantise(block, dtype)
        return out.reshape(stop - start, self.width, *self._extra)


@dataclass(frozen=True, eq=False)
class Passes:
    """The two passes of a resize to `size` (height, width), for a device that runs them itself."""

    size: tuple[int, int]
    vertical: Taps
    horizontal: Taps
    rows_first: bool  # whether the vertical pass comes first

    def reflected(self, height: int, width: int) -> Passes:
        """Return the same resize of which `reflect_pad` extends the result to `height` x `width`."""
        vertical = self.vertical.at(reflect(np.arange(height), self.size[0]))
        horizontal = self.horizontal.at(reflect(np.arange(width), self.size[1]))
        return Passes((height, width), vertical, horizontal, self.rows_first)

    def of_reflected(self, height: int, width: int) -> Passes:
        """Return the same resize of an image of `height` x `width` that `reflect_pad` extends first."""
        vertical = Taps(reflect(self.vertical.index, height), self.vertical.weight)
        horizontal = Taps(reflect(self.horizontal.index, width), self.horizontal.weight)
        return Passes(self.size, vertical, horizontal, self.rows_first)


def passes(source: tuple[int, int], size: tuple[int, int], convention: Convention = "matlab") -> Passes:
    """Return the passes of `imresize` for these heights and widths."""
    vertical, horizontal = (_taps(*sides, True, convention) for sides in zip(source, size, strict=True))
    return Passes(size, vertical, horizontal, size[0] * source[1] <= size[1] * source[0])


def _taps(size: int, out_size: int, antialias: bool, convention: Convention) -> Taps:
    scale = out_size / size
    stretch = min(scale, 1.0) if antialias else 1.0
    support = 4.0 / stretch
    centre = np.arange(1, out_size + 1) / scale + 0.5 * (1.0 - 1.0 / scale)
    first = np.floor(centre - support / 2)
    position = first[:, None] + np.arange(math.ceil(support) + 2)  # [out, taps], from 1
    weight = stretch * _cubic(stretch * (centre[:, None] - position), _A[convention])
    weight /= weight.sum(axis=1, keepdims=True)
    index = position.astype(np.int64) - 1
    if convention == "torch":
        index = index.clip(0, size - 1)
    else:
        index %= 2 * size
        index = np.where(index < size, index, 2 * size - 1 - index)
    used = np.any(weight != 0.0, axis=0)
    return Taps(index[:, used], weight[:, used])


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Return Keys' kernel (IEEE Trans. ASSP 29(6), 1981, Eq. 8)."""
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return np.where(x <= 1.0, near, np.where(x <= 2.0, far, 0.0))


def _resample(source: np.ndarray, taps: Taps) -> np.ndarray:
    """Return weighted sums of whole rows: [N, ...] -> float64 [out, ...]."""
    shape = (len(taps.index), *source.shape[1:])
    total, term = np.zeros(shape), np.empty(shape)
    for tap in range(taps.index.shape[1]):
        weight = taps.weight[:, tap].reshape(-1, *([1] * (source.ndim - 1)))
        np.multiply(source[taps.index[:, tap]], weight, out=term)
        total += term
    return total


def _resample_columns(source: np.ndarray, taps: Taps) -> np.ndarray:
    """Apply `_resample` along the second axis, on a transposed copy so that whole lines are gathered."""
    return _resample(np.ascontiguousarray(source.swapaxes(0, 1)), taps).swapaxes(0, 1)


def _quantise(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round half to even and clip to an integer type's range, in place; a float image passes unchanged."""
    if dtype.kind == "f":
        return values
    np.rint(values, out=values)
    return np.clip(values, 0, np.iinfo(dtype).max, out=values)


def reflect_pad(
    image: np.ndarray, min_height: int, min_width: int, *, axes: tuple[int, int] = (-2, -1)
) -> tuple[np.ndarray, tuple[int, int]]:
    """Extend an image at the bottom and right by reflection to at least `min_height` x `min_width`.

    `axes` are the positions of height and width: (-2, -1) for [..., H, W], (0, 1) for [H, W, C]. The edge
    pixel is not repeated; an image smaller than the padding is reflected back and forth, a line of one pixel
    is repeated. Returns the image (itself where it is large enough) and its original `(height, width)`, to
    crop by.
    """
    size = (image.shape[axes[0]], image.shape[axes[1]])
    if min(size) < 1:
        raise ValueError(f"cannot pad an empty image of shape {image.shape}")
    for axis, length, minimum in zip(axes, size, (min_height, min_width), strict=True):
        if length < minimum:
            image = np.take(image, reflect(np.arange(minimum), length), axis=axis)
    return image, size


def reflect(position: np.ndarray, length: int) -> np.ndarray:
    """Fold integer positions into 0 .. length - 1 by reflection; the ends are not repeated."""
    period = max(2 * (length - 1), 1)
    position = position % period
    return np.minimum(position, period - position)
