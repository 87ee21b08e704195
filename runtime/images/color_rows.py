"""Color correction of an image that is read in rows, twice: for the statistics, and to be corrected.

The values are those of `color.fix_color` on the whole image. Means and deviations are merged from blocks of
rows, in float64 (Chan, Golub and LeVeque, 1983). The low wavelet band of a strip is computed with the rows
around it that it depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from moesr.runtime.images import color, flat_regions
from moesr.runtime.images.flat_regions import CELL_PX, LEVEL, Protection, Regions, Search

Rows = Callable[[int, int], np.ndarray]
"""Rows of an image by their first one and the one after the last: float32 [rows, C, W], to be changed."""

MARGIN = -(-(2**color.LEVELS - 1) // CELL_PX) * CELL_PX
"""Rows on either side of a strip that its low band depends on, a multiple of a cell's side."""

STRIP_PX = 1 << 20
"""Pixels of a strip, beside its margins."""


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations of the values so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        if not values.size:
            return
        values = values.astype(np.float64)
        mean, count = float(values.mean()), self.count + values.size
        values -= mean
        apart = mean - self.mean
        self.squares += float(np.vdot(values, values)) + apart * apart * self.count * values.size / count
        self.mean += apart * values.size / count
        self.count = count

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / max(self.count - 1, 1) + color.VARIANCE_EPS)


class RowCorrection:
    """The correction of an image [H, C, W] by one of `color.COLOR_FIXES`; see `color.fix_color`."""

    def __init__(
        self, content: Rows, style: Rows, height: int, width: int, channels: int, method: str
    ) -> None:
        """`style` is the input enlarged to the same size; both are read here for statistics and regions."""
        self._content, self._style, self._method = content, style, method
        self._height, self._width, self._channels = height, width, channels
        self.strip_rows = max(STRIP_PX // width // CELL_PX, 1) * CELL_PX
        self._regions = self._search()
        self._lines = self._measure() if method == "adain" else []
        self._protections = [self._protected(channel) for channel in range(channels)]

    def corrected(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the corrected rows in strips from the top: the first row, and float32 [rows, C, W]."""
        correct = {"adain": self._adain, "wavelet": self._wavelet, "none": self._pinned}[self._method]
        for rows in self._strips():
            yield rows.start, correct(rows)

    def _protected(self, channel: int) -> Protection | None:
        """Return the protection of a channel's regions, whose differences are not needed afterwards."""
        found = self._regions[channel]
        if found is None:
            return None
        protection = Protection(found, self._width)
        self._regions[channel] = replace(found, differences=found.differences[:0].copy())
        return protection

    def _strips(self) -> Iterator[slice]:
        for start in range(0, self._height, self.strip_rows):
            yield slice(start, min(start + self.strip_rows, self._height))

    def _search(self) -> list[Regions | None]:
        """Return the regions whose level is kept, by channel."""
        searches = [Search() for _ in range(self._channels)]
        for rows in self._strips():
            content, style = (image(rows.start, rows.stop) for image in (self._content, self._style))
            for channel, search in enumerate(searches):
                search.add(style[:, channel], content[:, channel])
        if self._method == "none":
            return [search.clipped() for search in searches]
        found = [search.flat() for search in searches]
        return [r and r.without_steady for r in found] if self._method == "wavelet" else found

    def _measure(self) -> list[tuple[float, float]]:
        """Return gain and offset by channel, from the pixels that are not near white or black."""
        sums = [(_Moments(), _Moments()) for _ in range(self._channels)]
        for rows in self._strips():
            images = [image(rows.start, rows.stop) for image in (self._content, self._style)]
            for channel, both in enumerate(sums):
                regions = self._regions[channel]
                outside = ... if regions is None else ~flat_regions.expand(regions.near, rows, self._width)
                for image, moments in zip(images, both, strict=True):
                    moments.add(image[:, channel][outside])
        lines = []
        for channel, (content, style) in enumerate(sums):
            gain = style.deviation / content.deviation
            lines.append((gain, style.mean - content.mean * gain))
            if (regions := self._regions[channel]) and style.deviation < LEVEL:
                self._regions[channel] = regions.without_steady
        return lines

    def _pinned(self, rows: slice) -> np.ndarray:
        content = self._content(rows.start, rows.stop)
        if any(self._protections):
            style = self._style(rows.start, rows.stop)
            for channel, protection in enumerate(self._protections):
                if protection:
                    plane = content[:, channel]
                    protection.pin(rows, plane, style[:, channel], plane)
        return content

    def _adain(self, rows: slice) -> np.ndarray:
        content = self._content(rows.start, rows.stop)
        style = self._style(rows.start, rows.stop) if any(self._protections) else content
        for channel, (gain, offset) in enumerate(self._lines):
            plane, protection = content[:, channel], self._protections[channel]
            if protection is None:
                np.multiply(plane, np.float32(gain), out=plane)
                plane += np.float32(offset)
            else:
                correction = plane * np.float32(gain - 1.0) + np.float32(offset)
                protection.apply(rows, plane, correction, style[:, channel], plane)
        return content

    def _wavelet(self, rows: slice) -> np.ndarray:
        around = slice(max(rows.start - MARGIN, 0), min(rows.stop + MARGIN, self._height))
        content, style = self._content(around.start, around.stop), self._style(around.start, around.stop)
        inner = slice(rows.start - around.start, rows.stop - around.start)
        for channel, protection in enumerate(self._protections):
            low, regions = style[:, channel] - content[:, channel], self._regions[channel]
            if regions is not None:
                low[flat_regions.expand(regions.pinned, around, self._width)] = 0.0
            low = color.low_band(low, color.LEVELS)[inner]
            plane = content[inner, channel]
            if protection is None:
                plane += low
            else:
                protection.apply(rows, plane, low, style[inner, channel], plane)
        return content[inner]
