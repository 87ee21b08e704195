"""TIFF files of measurements: floating-point, signed or 32-bit values, and any number of bands.

A model sees colors of 8 or 16 bits. The bands therefore go through it in groups of three, each as an image
of its own, and the results become one TIFF in the type of the input. Values that are no colors are scaled to
16 bits, so that a result has 65,536 levels between the lowest and the highest value. Bands of one group are
seen as red, green and blue, and their detail may mix. tifffile reads and writes these files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moesr.runtime.errors import InputError, MemoryLimitError, MoesrError, OutputError
from moesr.runtime.images import planes, tiff_library
from moesr.runtime.images.formats import brief
from moesr.runtime.images.metadata import Metadata
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.reading import MAX_INPUT_PX, LoadedImage
from moesr.runtime.system import memory
from moesr.runtime.system.files import new_file, reason

log = logging.getLogger("moesr")

GROUP = 3
"""Bands that go through the model together."""

SUFFIXES = (".tif", ".tiff")
"""Suffixes of the only format that can hold such values."""

_TOP = 65_535
_CONTIGUOUS = 4  # with more bands, a result has a plane per band
_NO_DATA = 42113
_UNEVEN = 16  # most values use less than one part in so many of the range


@dataclass(frozen=True, eq=False)
class Raster:
    """The bands of a TIFF: `values` [C, H, W] in the file's type.

    `valid` [C, H, W] is False where there is no value, and None if all are valid. `ranges` are the lowest and
    the highest value of each band, or None for values that are colors already. `no_data` marks missing
    values in a result.
    """

    values: np.ndarray
    valid: np.ndarray | None
    ranges: tuple[tuple[float, float], ...] | None
    no_data: float
    rgb: bool  # the first three bands are declared to be red, green and blue
    metadata: Metadata

    @property
    def count(self) -> int:
        """The number of images that go through the model."""
        return -(-len(self.values) // GROUP)

    @property
    def description(self) -> str:
        """The kind of values for a message, such as "5 bands of float32"."""
        count = len(self.values)
        return f"{count} band{'s' * (count > 1)} of {self.values.dtype.name}"

    def result_bytes(self, height: int, width: int) -> int:
        """Return the memory that the results of all groups, and the file made of them, take at this size."""
        return height * width * (2 * GROUP * self.count + 2 * len(self.values) * self.values.itemsize)

    def images(self) -> Iterator[LoadedImage]:
        """Yield the groups as images of 8 or 16 bits; a single band is grey, and a third one is repeated."""
        for start in range(0, len(self.values), GROUP):
            group = [self._color(band) for band in range(start, min(start + GROUP, len(self.values)))]
            stacked = [*group, *group[-1:] * (GROUP - len(group))]
            pixels = group[0] if len(group) == 1 else np.stack(stacked, axis=2)
            yield LoadedImage(np.ascontiguousarray(pixels), self.metadata)

    def _color(self, band: int) -> np.ndarray:
        """Return a band as uint8 or uint16; missing values are filled from those around them."""
        values = self.values[band]
        if self.ranges is None:
            color = values
        else:
            low, high = self.ranges[band]
            known = values.astype(np.float64)
            if self.valid is not None:
                known[~self.valid[band]] = low
            color = np.rint((known - low) * (_TOP / (high - low or 1.0))).clip(0, _TOP).astype(np.uint16)
        if self.valid is None or self.valid[band].all():
            return color
        filled = planes.fill_transparent(color[..., None].repeat(3, axis=2), self.valid[band])
        return filled[..., 0]

    def joined(self, results: Sequence[np.ndarray]) -> np.ndarray:
        """Return the results of all groups as one array [C, H, W] in the type of the input."""
        height, width = results[0].shape[:2]
        made = np.empty((len(self.values), height, width), self.values.dtype)
        for band, out in enumerate(made):
            color = results[band // GROUP]
            color = color if color.ndim == 2 else color[..., band % GROUP]
            if self.ranges is None:
                out[...] = color
            else:
                low, high = self.ranges[band]
                exact = low + color.astype(np.float64) * ((high - low) / _TOP)
                out[...] = np.rint(exact) if out.dtype.kind in "iu" else exact
            if self.valid is not None:
                rows, columns = (
                    np.arange(size) * before // size
                    for size, before in zip((height, width), self.valid.shape[1:], strict=True)
                )
                out[~self.valid[band][rows][:, columns]] = self.no_data
        return made


def read(stream: BinaryIO, name: str) -> Raster | None:
    """Return the bands of a TIFF that is no usual image; None for any other file, or without tifffile.

    InputError if it cannot be used, MemoryLimitError if it does not fit into memory. The position in the
    stream is restored.
    """
    stream.seek(0)
    signature = stream.read(4)
    stream.seek(0)
    if signature not in tiff_library.SIGNATURES or tiff_library.library() is None:
        return None
    try:
        page = _opened(stream, name)
        return None if page is None else _raster(page, _values(page, name), name)
    finally:
        stream.seek(0)


def _opened(stream: BinaryIO, name: str) -> Any:
    """Return the first page if it holds measurements; None for any other file, also a damaged one."""
    try:
        page = tiff_library.page_of(stream, name)
        return page if _holds_measurements(page) else None
    except MemoryError:
        raise
    except Exception:  # the file is reported when it is read as a usual image
        return None


def _values(page: Any, name: str) -> np.ndarray:
    """Return the values of a page as [C, H, W]."""
    try:
        _check_size(page, name)
        return tiff_library.values_of(page)
    except (MoesrError, MemoryError):
        raise
    except Exception as error:  # the library raises errors of any kind
        cure = "pip install imagecodecs" if "imagecodecs" in str(error) else "get the file again"
        raise InputError(f"{name}: truncated or damaged ({brief(error)}); {cure}") from error


def _holds_measurements(page: Any) -> bool:
    """Return True unless a page has 8 or 16 bits of grey or RGB, with alpha or without, or a palette."""
    if page.dtype is None or int(page.photometric) not in tiff_library.PLAIN or page.imagedepth > 1:
        return False
    if page.dtype.kind in "fi" or (page.dtype.kind == "u" and page.dtype.itemsize > 2):
        return True
    colors = 3 if int(page.photometric) == tiff_library.RGB else 1
    return page.dtype.kind == "u" and page.samplesperpixel > colors + 1


def _check_size(page: Any, name: str) -> None:
    pixels, free = page.imagewidth * page.imagelength, memory.available_bytes()
    if not 0 < pixels <= MAX_INPUT_PX:
        raise InputError(
            f"{name}: has {page.imagewidth}x{page.imagelength} pixels, expected at least one and at most "
            f"{MAX_INPUT_PX // 10**6} million; cut it into parts"
        )
    needed = 2 * pixels * page.samplesperpixel * page.dtype.itemsize
    if free is not None and needed > free:
        raise MemoryLimitError(
            f"{name}: {page.samplesperpixel} bands need {memory.readable(needed)} of memory to be read, "
            f"{memory.readable(free)} are free; use fewer bands"
        )


def _raster(page: Any, values: np.ndarray, name: str) -> Raster:
    """Find missing values and ranges; warnings say what the result cannot keep."""
    no_data = _no_data(page)
    valid = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
    if no_data is not None:
        valid &= values != no_data
    if not valid.any():
        raise InputError(f"{name}: has no valid value; nothing can be enlarged")
    rgb = int(page.photometric) == tiff_library.RGB
    colors = values.dtype.kind == "u" and values.dtype.itemsize <= 2
    ranges = None if colors else _ranges(values, valid, together=rgb and len(values) == GROUP)
    missing = no_data if no_data is not None else float("nan") if values.dtype.kind == "f" else 0.0
    known = None if valid.all() else valid
    raster = Raster(values, known, ranges, missing, rgb, tiff_library.metadata_of(page, name))
    groups = f", {GROUP} bands at a time" if len(values) > GROUP else ""
    scaled = "" if ranges is None else "; its values are scaled to 65,536 levels for the model, and back"
    if _has_further_pages(page):
        log.warning("%s: has several pages; only the first is used", name)
    log.warning("%s: %s, enlarged as if they were colors%s%s", name, raster.description, groups, scaled)
    if ranges and any(_is_uneven(values[b], valid[b], *ranges[b]) for b in range(len(values))):
        log.warning(
            "%s: few values lie far from all others, which leaves few levels for these; cut them off before",
            name,
        )
    return raster


def _has_further_pages(page: Any) -> bool:
    """Return True if the file has another page than this one and its overviews."""
    try:
        return any(not other.is_reduced for other in list(page.parent.pages)[1:])
    except Exception:  # damaged directories, which are not needed
        return False


def _no_data(page: Any) -> float | None:
    """Return the value that GDAL's tag declares to be missing."""
    tag = page.tags.get(_NO_DATA)
    try:
        return None if tag is None else float(str(tag.value).strip("\0 "))
    except ValueError:
        return None


def _ranges(values: np.ndarray, valid: np.ndarray, *, together: bool) -> tuple[tuple[float, float], ...]:
    """Return lowest and highest value of each band; those of RGB are equal, which keeps the colors."""
    found = []
    for band, known in zip(values, valid, strict=True):
        inside = band[known]
        found.append((float(inside.min()), float(inside.max())) if inside.size else (0.0, 0.0))
    if not together:
        return tuple(found)
    low, high = min(low for low, _ in found), max(high for _, high in found)
    if low >= 0.0 and 0.25 < high <= 1.0:  # colors from 0 to 1
        low, high = 0.0, 1.0
    return ((low, high),) * len(found)


def _is_uneven(values: np.ndarray, valid: np.ndarray, low: float, high: float) -> bool:
    """Return True if 99.8 % of the values lie in a small part of the range."""
    inside = values[valid]
    if not inside.size:
        return False
    first, last = np.quantile(inside[:: max(inside.size // 1_000_000, 1)], (0.001, 0.999))
    return (last - first) * _UNEVEN < high - low


def check_output(path: Path, raster: Raster) -> None:
    """Raise OutputError if a file of this name cannot hold the values."""
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(
            f"{path}: only TIFF can hold {raster.description}; use --format tif, or name a .tif file with -o"
        )


def save(
    path: Path, raster: Raster, results: Sequence[LoadedImage], record: Provenance | None = None
) -> None:
    """Write the results of all groups as one TIFF, complete or not at all; OutputError if that fails."""
    made = raster.joined([result.pixels for result in results])
    contiguous = 1 < len(made) <= _CONTIGUOUS
    fitting = results[0].metadata
    try:
        with new_file(path) as scratch:
            tiff_library.library().imwrite(
                scratch,
                np.moveaxis(made, 0, -1) if contiguous else made[0] if len(made) == 1 else made,
                photometric="rgb" if raster.rgb else "minisblack",
                planarconfig=None if len(made) == 1 else "contig" if contiguous else "separate",
                **tiff_library.write_options(str(path), fitting, record, made.nbytes),
            )
    except MemoryError:
        raise
    except Exception as error:  # the library raises errors of any kind
        raise OutputError(f"{path}: cannot be written: {reason(error)}") from error
