"""Images that are too large to be held: everything of the size of the result lies in temporary files.

There are three: the enlarged input, the decoded rows in float32, so that the color correction has the values
that it would have in memory, and the result in its own type. Of latents and input, which are much smaller,
memory is taken as usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moesr.runtime.images.color_rows import RowCorrection
from moesr.runtime.images.planes import Planes, join, to_unit
from moesr.runtime.images.resize import Resizer, reflect
from moesr.runtime.images.spool import Spool, place_for
from moesr.runtime.loop import processing
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import TileLayout

SPOOL_FROM_PX = 24_000_000
"""Results with at least so many pixels are spooled; in memory they would take a gigabyte."""

MAPPED_BYTES = 64 << 20
"""About so much of the enlarged input stays mapped while it is read."""


def can_spool(layout: TileLayout) -> bool:
    """Return True if an image can be spooled: it is not reduced after the decoder, and does not wrap."""
    return layout.frame.image == layout.result and not layout.wraps


def disk_bytes(layout: TileLayout, dtype: np.dtype, channels: int) -> int:
    """Return the bytes of the temporary files of an image of this type and number of channels."""
    (height, width), (rows, columns) = layout.result, layout.frame.canvas
    lr = rows * columns * 3 * processing.enlarged_type(layout.manifest, dtype).itemsize
    return lr + height * width * (12 + channels * dtype.itemsize)


class SpooledWork:
    """The temporary files of one image, from its preparation to its result; the sink of its job."""

    def __init__(
        self, layout: TileLayout, planes: Planes, settings: Settings, folders: Sequence[Path]
    ) -> None:
        """OutputError if none of the folders has room on its disk."""
        self._layout, self._settings = layout, settings
        (height, width), (rows, columns) = layout.result, layout.frame.canvas
        dtype = planes.rgb.dtype
        folder = place_for(folders, disk_bytes(layout, dtype, planes.channels))
        self._lr = Spool(folder, rows, columns, 3, processing.enlarged_type(layout.manifest, dtype))
        self._decoded = Spool(folder, height, 3, width, np.float32)
        self.result = Spool(folder, height, width, planes.channels, dtype)

    def prepare(self, planes: Planes) -> Job:
        """Make the job that `processing.prepare` makes, with the enlarged input on disk."""
        source, enlarged = processing.enlarging(self._layout, planes.rgb)
        (rows, columns), size = self._layout.frame.canvas, (enlarged.height, enlarged.width)
        down, across = reflect(np.arange(rows), size[0]), reflect(np.arange(columns), size[1])
        step = max(MAPPED_BYTES // (3 * 2 * columns), 1)
        for start in range(0, rows, step):
            needed = down[start : start + step]
            first = int(needed.min())
            block = enlarged.rows(first, int(needed.max()) + 1)[needed - first]
            self._lr.write(start, block if columns == size[1] else block[:, across])
        lr = self._lr.pixels
        condition = processing.condition_of(self._layout, lr if source is None else source, planes.rgb)
        self._lr.release()
        return Job(self._layout, lr, condition, self._settings, sink=self)

    def write(self, start: int, rows: np.ndarray) -> None:
        """See `RowSink.write`."""
        height, width = self._layout.result
        if start < height:
            self._decoded.write(start, rows[:, : height - start, :width].transpose(1, 0, 2))
        self._lr.release()

    def finish(self, planes: Planes) -> Spool:
        """Make the result that `processing.finish` makes, in the type and channels of the input, on disk."""
        height, width = self._layout.result
        top = np.iinfo(planes.rgb.dtype).max
        alpha = None if planes.alpha is None else Resizer(planes.alpha, height, width)
        made = RowCorrection(self._decoded.read, self._style, height, width, 3, self._settings.color_fix)
        for start, rows in made.corrected():
            stop = start + len(rows)
            rgb = processing.to_integers(rows, top).transpose(0, 2, 1).astype(planes.rgb.dtype)
            image = join(rgb, alpha.rows(start, stop) if alpha else None, planes)
            self.result.write(start, image.reshape(len(rows), width, -1))
        self._decoded.close()
        self._lr.close()
        return self.result

    def close(self) -> None:
        """Give the disk space back."""
        for spool in (self._lr, self._decoded, self.result):
            spool.close()

    def _style(self, start: int, stop: int) -> np.ndarray:
        """Return rows of the enlarged input in [-1, 1]: float32 [rows, 3, W]."""
        pixels = self._lr.read(start, stop)[:, : self._layout.result[1]].transpose(0, 2, 1)
        return to_unit(pixels, np.empty(pixels.shape, np.float32))
