"""Images of several types as sources of jobs; a result becomes an image of the same type."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from moesr.runtime.errors import InputError
from moesr.runtime.images import reading, writing
from moesr.runtime.images.planes import Planes, checked, split
from moesr.runtime.images.reading import LoadedImage
from moesr.runtime.images.rows import PlacedImage, SpooledImage
from moesr.runtime.loop import processing
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.spooled import SpooledWork
from moesr.runtime.loop.tile_layout import Size, TileLayout


class Source(Protocol):
    """An image to be super-resolved, of any kind."""

    @property
    def size(self) -> Size:
        """Height and width in pixels, found without reading the pixels."""
        ...

    def prepare(self, layout: TileLayout, settings: Settings, spooled: bool = False) -> Job:
        """Read the pixels and make a job of them, once there is memory for it.

        If `spooled`, whatever has the size of the result goes to temporary files.
        """
        ...

    def finish(self, job: Job) -> Any:
        """Make the result of a job that is done, as an image of the caller's type."""
        ...

    def extra_bytes(self, layout: TileLayout, settings: Settings) -> int:
        """Return the bytes that the image takes where the graphs run, besides those of `image_bytes`."""
        ...


class Picture:
    """An image in memory: a NumPy array, a PIL image or a LoadedImage."""

    def __init__(self, image: Any) -> None:
        """Take an image; InputError if its type, shape or dtype is not supported."""
        self._image: Any = image
        self._loaded = image if isinstance(image, LoadedImage) else None
        self._planes: Planes | None = None
        self._from_pil = isinstance(image, Image.Image)
        if isinstance(image, Image.Image):
            self.size: Size = image.height, image.width
        else:
            height, width = checked(self._loaded.pixels if self._loaded else image).shape[:2]
            self.size = height, width
        self._work: SpooledWork | None = None
        if not all(self.size):
            raise InputError(f"the image has no pixels ({self.size[1]}x{self.size[0]})")

    def prepare(self, layout: TileLayout, settings: Settings, spooled: bool = False) -> Job:
        """See `Source.prepare`."""
        if self._from_pil:
            self._loaded = reading.from_pil(self._image)
        planes = split(
            self._loaded.pixels if self._loaded else self._image,
            keep_colors_under_alpha=settings.keep_colors_under_alpha,
        )
        height, width = planes.rgb.shape[:2]
        if (height, width) != self.size:  # a PIL image was rotated upright
            layout = settings.layout(layout.manifest, height, width)
        if spooled:
            self._work = SpooledWork(layout, planes, settings, self._folders())
            job = self._work.prepare(planes)
        else:
            job = processing.prepare(layout, planes, settings)
        alpha = None if planes.alpha is None else planes.alpha.copy()
        self._planes = replace(planes, rgb=np.empty((0, 0, 3), planes.rgb.dtype), alpha=alpha)
        if not self._loaded:
            self._image = None  # the caller's array, which may change from now on
        return job

    def finish(self, job: Job) -> Any:
        """See `Source.finish`."""
        assert self._planes
        spool = self._work.finish(self._planes) if self._work else None
        self._work = None
        if spool is None:
            pixels = processing.finish(self._planes, job)
        else:
            pixels = spool.pixels[..., 0] if self._planes.ndim == 2 else spool.pixels
        if job.saved and (self._from_pil or self._loaded is None):
            job.saved.remove()  # the caller has the result; that of a file is kept until it is written
        if self._from_pil:
            return writing.to_pil(pixels, self._loaded)
        if self._loaded is None:
            return pixels
        unfinished = (*self._loaded.unfinished, *([job.saved.path] if job.saved else []))
        result = reading.with_pixels(self._loaded, pixels)
        values = result.metadata, tuple(job.warnings), unfinished
        return SpooledImage(pixels, *values, spool=spool) if spool else LoadedImage(pixels, *values)

    def extra_bytes(self, layout: TileLayout, settings: Settings) -> int:
        """See `Source.extra_bytes`."""
        return 0

    def _folders(self) -> list[Path]:
        """Return places for temporary files, the preferred one first."""
        usual = Path(tempfile.gettempdir())
        return [self._loaded.folder, usual] if isinstance(self._loaded, PlacedImage) else [usual]
