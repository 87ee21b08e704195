"""Results that are written in rows, so that memory does not grow with the image.

A result is collected in a `Spool`, a temporary file of the result's own type, and `save_spool` encodes it:
PNG and JPEG by pyvips, TIFF by tifffile (both come with `moesr[large]`). Without these packages, and for
other formats, Pillow does the same with the whole image in memory.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moesr.runtime.errors import MemoryLimitError, OutputError
from moesr.runtime.images import encoding, metadata, png_chunks, reading, tiff_library, writing
from moesr.runtime.images.metadata import CAPACITIES, Metadata
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.reading import LoadedImage
from moesr.runtime.images.resize import Resizer
from moesr.runtime.images.spool import Spool, place_for
from moesr.runtime.system import memory
from moesr.runtime.system.files import new_file, reason, write_atomically

log = logging.getLogger("moesr")

NOTED_FROM_BYTES = 256 << 20
"""If the packages are missing, images of at least this size are reported in the log."""

_RESIZED_PX = 1 << 20  # pixels that are resampled at once
_INSTALL = "pip install moesr[large] reads and writes it in rows"
_STREAMED = ("PNG", "JPEG", "TIFF")
_SPACES = {("uchar", 1): "b-w", ("uchar", 3): "srgb", ("ushort", 1): "grey16", ("ushort", 3): "rgb16"}
_JPEG_HEAD = b"JFIF\0\1\1"
_PHYS_BYTES = 21  # the chunk of a resolution, which pyvips always writes


@dataclass(frozen=True, eq=False)
class PlacedImage(LoadedImage):
    """An image whose temporary files belong in `folder`, or one above it if that does not exist yet."""

    folder: Path = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class SpooledImage(LoadedImage):
    """An image whose `pixels` are mapped from a spool. They stay valid after the spool is closed."""

    spool: Spool = field(kw_only=True)


def save(
    path: Path, image: LoadedImage, record: Provenance | None = None, quality: int | None = None
) -> None:
    """Write an image as `writing.save` does, row by row if it is spooled; its spool is closed then."""
    if not isinstance(image, SpooledImage):
        return writing.save(path, image, record, quality)
    save_spool(path, image.spool, image.metadata, record, quality)
    return image.spool.close()


def resized(image: SpooledImage, height: int, width: int, folders: Sequence[Path]) -> SpooledImage:
    """Return a spooled image in another size, resampled in rows; the spool of the old one is closed."""
    channels = image.spool.shape[2]
    nbytes = height * width * channels * image.spool.dtype.itemsize
    made = Spool(place_for(folders, nbytes), height, width, channels, image.spool.dtype)
    source = image.spool.pixels
    resizer = Resizer(source, height, width)
    step = max(_RESIZED_PX // width, 1)
    for start in range(0, height, step):
        made.write(start, resizer.rows(start, min(start + step, height)))
        image.spool.release()
    image.spool.close()
    pixels = made.pixels[..., 0] if image.pixels.ndim == 2 else made.pixels
    after = reading.with_pixels(image, pixels)
    assert isinstance(after, SpooledImage)
    return replace(after, spool=made)


def held_bytes(path: Path, height: int, width: int, channels: int, deep: bool = False) -> int:
    """Return the memory that Pillow needs to encode an image; 0 if the image can be written in rows."""
    name = writing.check_output(path, width, height).name
    if _streams(name, channels, deep):
        return 0
    return height * width * (12 if deep and channels > 1 else 4 + 4 * (name in ("WEBP", "BMP")))


def check_memory(path: Path, height: int, width: int, channels: int, deep: bool = False) -> None:
    """Raise MemoryLimitError if an image could not be encoded in the memory that is free."""
    needed, free = held_bytes(path, height, width, channels, deep), memory.available_bytes()
    if free is not None and needed > free:
        name = writing.check_output(path, width, height).name
        lacking = name in _STREAMED and (_pyvips() is None or tiff_library.library() is None)
        cure = _INSTALL if lacking else "PNG and TIFF are written in rows with pip install moesr[large]"
        raise MemoryLimitError(
            f"{path}: {width}x{height} pixels need {memory.readable(needed)} of memory to be written, "
            f"{memory.readable(free)} are free; {cure}"
        )


def _streams(name: str, channels: int, deep: bool) -> Any:
    """Return the module that writes such an image in rows; None if Pillow has to hold the image."""
    if name == "TIFF":
        return None if channels == 2 and deep else tiff_library.library()  # Pillow could not read it again
    if name == "PNG" or (name == "JPEG" and channels in (1, 3) and not deep):
        return _pyvips()
    return None


def save_spool(
    path: Path,
    spool: Spool,
    carried: Metadata,
    record: Provenance | None = None,
    quality: int | None = None,
) -> None:
    """Encode a spool in the format of the suffix of `path`, with metadata and record, like `writing.save`.

    16 bits are kept in a PNG and a TIFF, also with color and alpha. Raises UsageError for the suffix,
    OutputError if the file cannot be written.
    """
    height, width, channels = spool.shape
    kind = writing.check_output(path, width, height)
    deep = spool.dtype == np.uint16
    held = carried.icc is None or len(carried.icc) <= CAPACITIES[kind.name].icc
    library = _streams(kind.name, channels, deep)
    if not held or library is None:
        pixels = spool.pixels[..., 0] if channels == 1 else spool.pixels
        check_memory(path, height, width, channels, deep)
        _note(str(path), spool.nbytes, kind.name in _STREAMED and _pyvips() is None)
        return writing.save(path, LoadedImage(pixels, carried), record, quality)
    fitted = metadata.fitted(carried, kind.name, str(path), grey=channels < 3)
    try:
        if kind.name == "TIFF":
            with new_file(path) as scratch:
                _write_tiff(scratch, str(path), spool, fitted, record, library)
        else:
            with write_atomically(path) as stream:
                encode = _write_png if kind.name == "PNG" else _write_jpeg
                encode(stream, spool, fitted, record, library, quality or kind.options.get("quality", 95))
    except (MemoryError, OutputError):
        raise
    except Exception as error:  # each library has errors of its own
        raise OutputError(f"{path}: cannot be written: {reason(error)}") from error
    return None


def _write_png(
    stream: BinaryIO, spool: Spool, m: Metadata, record: Provenance | None, vips: Any, quality: int
) -> None:
    chunks = list(m.color)
    if m.icc:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(m.icc)))
    if m.dpi:
        per_metre = [round(value / 0.0254) for value in m.dpi]
        chunks.append((b"pHYs", struct.pack(">IIB", *per_metre, 1)))
    if m.exif:
        chunks.append((b"eXIf", m.exif.removeprefix(b"Exif\0\0")))
    texts = [(chunk[0], chunk[1]) for chunk in encoding.png_texts(m, record).chunks]
    inserted = b"".join(png_chunks.packed(*chunk) for chunk in (*chunks, *texts))
    with _vips_target(png_chunks.Inserting(stream, inserted, skip=_PHYS_BYTES), vips) as target:
        _as_vips(spool, vips).pngsave_target(target, keep="none", compression=6)


def _write_jpeg(
    stream: BinaryIO, spool: Spool, m: Metadata, record: Provenance | None, vips: Any, quality: int
) -> None:
    density = struct.pack(">BHH", 1, *(round(v) for v in m.dpi)) if m.dpi else struct.pack(">BHH", 0, 1, 1)
    inserted = encoding.segment(0xE0, _JPEG_HEAD + density + b"\0\0")
    if m.exif:
        inserted += encoding.segment(0xE1, m.exif)
    parts = [m.icc[i : i + 65_519] for i in range(0, len(m.icc), 65_519)] if m.icc else []
    for number, part in enumerate(parts, 1):
        inserted += encoding.segment(0xE2, b"ICC_PROFILE\0" + bytes((number, len(parts))) + part)
    inserted += encoding.jpeg_segments(m, record)
    after_marker = png_chunks.Inserting(stream, inserted, at=2)  # the marker that starts the file
    with _vips_target(after_marker, vips) as target:
        _as_vips(spool, vips).jpegsave_target(target, keep="none", Q=quality, subsample_mode="off")


def _write_tiff(
    path: Path, name: str, spool: Spool, m: Metadata, record: Provenance | None, tifffile: Any
) -> None:
    channels = spool.shape[2]
    tifffile.imwrite(
        path,
        spool.pixels[..., 0] if channels == 1 else spool.pixels,
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        **tiff_library.write_options(name, m, record, spool.nbytes),
    )


def _as_vips(spool: Spool, vips: Any) -> Any:
    height, width, channels = spool.shape
    kind = "ushort" if spool.dtype == np.uint16 else "uchar"
    space = _SPACES[kind, 3 if channels > 2 else 1]
    return vips.Image.rawload(
        str(spool.path), width, height, channels, format=kind, interpretation=space, access="sequential"
    )


@contextlib.contextmanager
def _vips_target(stream: Any, vips: Any) -> Iterator[Any]:
    """Yield a target that writes to a stream; an error of the stream is raised at the end.

    An exception inside the callback would be printed with a traceback by the library.
    """
    errors: list[Exception] = []

    def write(data: bytes) -> int:
        try:
            return -1 if errors else stream.write(data)
        except Exception as error:
            errors.append(error)
            return -1

    target = vips.TargetCustom()
    target.on_write(write)
    try:
        yield target
    finally:
        if errors:
            raise errors[0]


def _note(name: str, nbytes: int, for_lack_of_packages: bool) -> None:
    if for_lack_of_packages and nbytes >= NOTED_FROM_BYTES:
        log.info("%s: held in memory, %d MB; %s", name, nbytes >> 20, _INSTALL)


def _pyvips() -> Any:
    """Return the module, or None if it is not installed or finds no libvips."""
    try:
        import pyvips
    except Exception:  # it raises OSError if it finds no library
        return None
    logging.getLogger("pyvips").addHandler(logging.NullHandler())  # its warnings are raised as errors too
    return pyvips
