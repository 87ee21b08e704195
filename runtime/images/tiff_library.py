"""TIFF files through tifffile (from `moesr[large]`): written in rows, and read if Pillow cannot read them."""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moesr.runtime.images import encoding, exif, tiff_tags
from moesr.runtime.images.deep_color import upright
from moesr.runtime.images.formats import brief
from moesr.runtime.images.metadata import Metadata, resolution
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.tiff_tags import Tag

log = logging.getLogger("moesr")

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""The first bytes of TIFF and BigTIFF files in both byte orders."""

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
PLAIN = (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
"""Photometric interpretations in which values need no conversion of colors."""

_X_RESOLUTION, _Y_RESOLUTION, _UNIT, _CENTIMETER = 282, 283, 296, 3
_RESOLUTION_TAGS = (_X_RESOLUTION, _Y_RESOLUTION, _UNIT)  # which tifffile writes itself
_ORIENTATION, _PROFILE = 274, 34675
_PREMULTIPLIED, _SEPARATE = 1, 2  # kinds of alpha
_BIG_BYTES = 1 << 31  # larger files are BigTIFF


def library() -> Any:
    """Return the module, or None if it is not installed."""
    try:
        import tifffile
    except ImportError:
        return None
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # its warnings are about metadata
    return tifffile


def page_of(stream: BinaryIO, name: str, number: int = 0) -> Any:
    """Return a page of an open TIFF; the library raises errors of any kind."""
    stream.seek(0)
    return library().TiffFile(stream, name=Path(name).name).pages[number]


def picture(stream: BinaryIO, name: str, most_px: int, number: int = 0) -> np.ndarray | None:
    """Return a page that Pillow cannot read: uint8 or uint16, [H, W] or [H, W, C] with C of 2 to 4, upright.

    None is returned if the library is not installed or cannot read it either, if it is no grey or RGB image
    of 8 or 16 bits with alpha or without, and if it has more than `most_px` pixels. The position in the
    stream is restored.
    """
    if library() is None:
        return None
    before = stream.tell()
    try:
        page = page_of(stream, name, number)
        colors = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3}.get(int(page.photometric), 0)
        alphas = page.samplesperpixel - colors
        kinds = [int(kind) for kind in page.extrasamples]
        usual = page.dtype in (np.uint8, np.uint16) and page.imagedepth == 1 and colors
        if not usual or alphas not in (0, 1) or (alphas and kinds[-1] not in (_PREMULTIPLIED, _SEPARATE)):
            return None
        if not 0 < page.imagewidth * page.imagelength <= most_px:
            return None
        values = values_of(page)
    except MemoryError:
        raise
    except Exception:  # the caller reports why Pillow cannot read it
        return None
    finally:
        stream.seek(before)
    if int(page.photometric) == WHITE_IS_ZERO:
        values[:1] = np.iinfo(values.dtype).max - values[:1]
    if alphas and kinds[-1] == _PREMULTIPLIED:
        values = _divided(values)
    return values[0] if len(values) == 1 else np.ascontiguousarray(np.moveaxis(values, 0, -1))


def _divided(values: np.ndarray) -> np.ndarray:
    """Return [C, H, W] whose last band is alpha, with the other bands divided by it."""
    top, alpha = np.iinfo(values.dtype).max, values[-1]
    gain = top / np.maximum(alpha, 1).astype(np.float32)
    return np.concatenate([np.rint(values[:-1] * gain).clip(0, top).astype(values.dtype), alpha[None]])


def write_options(name: str, m: Metadata, record: Provenance | None, nbytes: int) -> dict[str, Any]:
    """Return the arguments of `tifffile.imwrite` for the compression and the metadata of `nbytes` of pixels.

    A warning about the file `name` tells what TIFF cannot hold.
    """
    block = exif.marked(m.exif, record) if record else m.exif
    tags, lost = encoding.tiff_tags_of(m, block)
    if lost:
        log.warning("%s: TIFF cannot hold %s; PNG can", name, ", ".join(lost))
    kinds = {tag: tags.tagtype[tag] for tag in tags if tag not in _RESOLUTION_TAGS}
    return {
        "compression": "zlib",
        "compressionargs": {"level": 1},  # a higher level takes minutes for 100 megapixels of 16 bits
        "rowsperstrip": 64,
        "bigtiff": nbytes > _BIG_BYTES,
        "metadata": None,
        "software": False,
        "resolution": m.dpi or (1, 1),
        "resolutionunit": "inch" if m.dpi else "none",
        "iccprofile": m.icc,
        "extratags": [(tag, kind, *_counted(tags[tag], kind), True) for tag, kind in kinds.items()],
    }


def _counted(value: Any, kind: int) -> tuple[int, Any]:
    """Return the number of values and the values of a tag, in tifffile's form."""
    if isinstance(value, (bytes, str)):
        data = value if isinstance(value, bytes) else value.encode("latin-1", "replace")
        return len(data) + (kind == 2), data + (b"\0" if kind == 2 else b"")
    values = value if isinstance(value, tuple) else (value,)
    if kind in (5, 10):  # fractions
        fractions = [Fraction(float(v)).limit_denominator(10_000) for v in values]
        return len(values), [part for f in fractions for part in (f.numerator, f.denominator)]
    return len(values), value


def values_of(page: Any) -> np.ndarray:
    """Return the values of a page as [C, H, W] in this machine's byte order, turned upright.

    ValueError if the file has fewer strips or tiles than the size of the page needs; the library would take
    zeros for the others. It raises errors of any other kind as well.
    """
    if len(page.dataoffsets) < math.prod(page.chunked):
        raise ValueError(f"it has {len(page.dataoffsets)} of {math.prod(page.chunked)} strips or tiles")
    values = np.asarray(page.asarray())
    if values.ndim == 2:
        values = values[None]
    elif page.axes.endswith("S"):
        values = np.moveaxis(values, -1, 0)
    tag = page.tags.get(_ORIENTATION)
    values = upright(np.moveaxis(values, 0, -1), int(tag.value) if tag else 1)
    return np.ascontiguousarray(np.moveaxis(values, -1, 0), values.dtype.newbyteorder("="))


def metadata_of(page: Any, name: str) -> Metadata:
    """Return georeference, profile, XMP, description and resolution; a warning names the rest.

    Damaged metadata are left out, with a warning as well.
    """
    try:
        return _metadata(page, name)
    except Exception as error:  # a damaged tag may hold anything; the pixels can be used without it
        log.warning("%s: some of its metadata is damaged and left out (%s)", name, brief(error))
        return Metadata()


def _metadata(page: Any, name: str) -> Metadata:
    """Return the metadata of a page; raises errors of any kind if they are damaged."""
    tags = {
        tag.code: Tag(int(tag.dtype), tag.value)
        for tag in page.tags.values()
        if tag.code in tiff_tags.GEO | tiff_tags.COLOR
    }
    found = {tag.code: tag.value for tag in page.tags.values()}
    text = str(found.get(tiff_tags.DESCRIPTION, ""))
    block = exif.with_description(None, text) if text and not tiff_tags.describes_pixels(text) else None
    kept = tiff_tags.STORAGE | {tiff_tags.DESCRIPTION, tiff_tags.SOFTWARE, *tags}
    kept |= {_X_RESOLUTION, _Y_RESOLUTION, _UNIT}
    if left_out := [tiff_tags.name_of(code) for code in sorted(found.keys() - kept)]:
        log.warning("%s: left out of the result: %s", name, ", ".join(left_out))
    packet, profile = found.get(tiff_tags.XMP), found.get(_PROFILE)
    return Metadata(
        icc=profile if isinstance(profile, bytes) else None,
        exif=block,
        dpi=_dpi(found),
        xmp=packet.strip(b"\0") if isinstance(packet, bytes) else None,
        tags=tags,
    )


def _dpi(found: dict[int, Any]) -> tuple[float, float] | None:
    """Return the resolution in pixels per inch; a unit of 1 is none."""
    unit = int(found.get(_UNIT, 2))
    if _X_RESOLUTION not in found or unit == 1:
        return None
    parts = [found.get(tag) for tag in (_X_RESOLUTION, _Y_RESOLUTION)]
    if not all(isinstance(part, tuple) and len(part) == 2 and part[1] for part in parts):
        return None
    values = tuple(part[0] / part[1] * (2.54 if unit == _CENTIMETER else 1.0) for part in parts if part)
    return resolution(values)
