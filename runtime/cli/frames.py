"""Files that are several images for the model, whose results go into one file again.

They are animations and files of several pages, and the bands of a TIFF of measurements.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from PIL import Image

from moesr.runtime.errors import InputError, MemoryLimitError, MoesrError, OutputError
from moesr.runtime.images import embedded, rasters, reading, writing
from moesr.runtime.images.metadata import Metadata
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.rasters import Raster
from moesr.runtime.images.reading import LoadedImage
from moesr.runtime.system import memory

log = logging.getLogger("moesr")

FORMATS = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
"""Formats that can hold several frames, by extension: APNG, animated WebP, and pages of TIFF."""

PIXEL_BYTES = 12
"""Memory per pixel of a result: up to four channels of 16 bits, and 8 bits of them for the encoder."""

DEFAULT_MS = 100
"""The duration of a frame if its file does not give one."""


@dataclass
class Frames:
    """The frames of one file: how long each is shown, and the results so far.

    The frames of a `raster` are its groups of bands.
    """

    count: int
    raster: Raster | None = None
    durations_ms: list[int] = field(default_factory=list)  # empty for pages of a TIFF
    loop: int = 0  # repetitions of an animation, 0 for endless
    still_first: bool = False  # the first frame of a PNG is shown only by programs without animations
    results: list[LoadedImage] = field(default_factory=list)
    failed: bool = False


def of(stream: BufferedReader, source: Path, target: Path, *, every: bool) -> Frames:
    """Return the frames of a file, or its first one unless `every` is set; OutputError as for `check`."""
    raster = rasters.read(stream, str(source))
    if raster:
        rasters.check_output(target, raster)
        return Frames(raster.count, raster)
    number = count(stream) if every else 1
    check(target, number)
    if number > 1 and target.suffix.lower() not in rasters.SUFFIXES and _several_sizes(stream, number):
        raise OutputError(
            f"{target}: has to hold {number} pages of several sizes, which only TIFF can; use --format tif"
        )
    return Frames(number)


def _several_sizes(stream: BufferedReader, number: int) -> bool:
    """Return True if the pages of a TIFF differ in size; a damaged page is reported when it is read."""
    try:
        with warnings.catch_warnings(action="ignore"), _opened(stream) as image:
            if image.format != "TIFF":
                return False
            sizes = set()
            for page in range(number):
                image.seek(page)
                sizes.add(image.size)
            return len(sizes) > 1
    except Exception:  # decoders raise errors of any kind
        return False


def count(stream: BufferedReader) -> int:
    """Return the number of frames or pages of an image file; 1 if it cannot be read as such."""
    try:
        stream.seek(0)
        with warnings.catch_warnings(action="ignore"), Image.open(stream, formats=_formats()) as image:
            several = getattr(image, "is_animated", False) and image.format != "MPO"
            return int(getattr(image, "n_frames", 1)) if several else 1
    except Exception:  # decoders raise errors of any kind; `reading.load` will explain this one
        return 1
    finally:
        stream.seek(0)


def check(target: Path, number: int) -> None:
    """Raise OutputError if a file of this name cannot hold several frames."""
    if number > 1 and target.suffix.lower() not in FORMATS:
        raise OutputError(
            f"{target}: {target.suffix} cannot hold {number} frames; use --format with one of "
            f"{', '.join(sorted({extension[1:] for extension in FORMATS}))}, or leave out --frames all"
        )


def check_memory(source: Path, sequence: Frames, size: tuple[int, int]) -> None:
    """Raise MemoryLimitError if the results of all frames of `size` (height, width) exceed the memory."""
    number, raster, free = sequence.count, sequence.raster, memory.available_bytes()
    needed = raster.result_bytes(*size) if raster else number * size[0] * size[1] * PIXEL_BYTES
    if (number > 1 or raster) and free is not None and needed > free:
        what = raster.description if raster else f"{number} frames"
        raise MemoryLimitError(
            f"{source}: {what} of {size[1]}x{size[0]} pixels need {memory.readable(needed)} of "
            f"memory, {memory.readable(free)} are free; ask for a smaller --size, or cut the file into parts"
        )


def read(stream: BufferedReader, path: Path, sequence: Frames) -> Iterator[LoadedImage]:
    """Yield the frames of a file in order, with their metadata; their durations go into `sequence`.

    Pages have metadata of their own, and all frames of an animation have those of the file. InputError if a
    frame is damaged or cannot be used.
    """
    if sequence.raster:
        yield from sequence.raster.images()
        return
    if sequence.count == 1:
        yield reading.load(path, stream)
        return
    try:
        with warnings.catch_warnings(action="ignore"), _opened(stream) as image:
            about = None if image.format == "TIFF" else _about(stream, path)
            sequence.loop = int(image.info.get("loop", 0))
            sequence.still_first = bool(getattr(image, "default_image", False))
            for number in range(sequence.count):
                image.seek(number)
                again = partial(_opened, stream, number)
                frame = reading.from_frame(image, f"{path} (frame {number + 1})", again, about)
                if image.format != "TIFF" and not (sequence.still_first and number == 0):  # now decoded
                    sequence.durations_ms.append(round(image.info.get("duration") or DEFAULT_MS))
                yield frame
    except (MoesrError, MemoryError):
        raise
    except Exception as error:  # decoders raise many kinds of errors
        raise InputError(f"{path}: a frame is truncated or damaged ({error}); get the file again") from error


def _about(stream: BufferedReader, path: Path) -> tuple[Metadata, int]:
    """Return the metadata and the orientation of an animation."""
    with _opened(stream) as image:
        found = embedded.read(image, str(path), stream)
    stream.seek(0)
    return found


@contextmanager
def _opened(stream: BufferedReader, number: int = 0) -> Iterator[Image.Image]:
    """Open a file at a frame."""
    stream.seek(0)
    with Image.open(stream, formats=_formats()) as image:
        image.seek(number)
        yield image


def save(path: Path, sequence: Frames, record: Provenance, quality: int | None = None) -> None:
    """Write the results of all frames as one file, complete or not at all, with the first one's metadata.

    Raises OutputError if the file cannot be written.
    """
    if sequence.raster:
        rasters.save(path, sequence.raster, sequence.results, record)
        return
    options: dict[str, Any] = {}
    results = sequence.results
    if any(result.metadata != results[0].metadata for result in results):
        log.warning("%s: its frames differ in their metadata; all get those of the first one", path)
    if sequence.durations_ms and path.suffix.lower() not in (".tif", ".tiff"):
        options = {"duration": sequence.durations_ms, "loop": sequence.loop}
    if sequence.still_first and path.suffix.lower() == ".png":
        options["default_image"] = True
    elif sequence.still_first:
        results = results[1:]
    writing.save(path, results[0], record, quality, writing.Following(results[1:], options))


def _formats() -> list[str]:
    Image.init()
    return [name for name in reading.READ_FORMATS if name in Image.OPEN]
