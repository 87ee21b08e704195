"""All metadata of an image, and the table of what each format can hold.

`Metadata` is independent of formats: `embedded.py` reads it from a file, `encoding.py` writes it into one.
`resized` adapts it to a new size; `fitted` leaves out what the target cannot hold, with a warning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from moesr.runtime.images import exif, icc, tiff_tags, xmp
from moesr.runtime.images.png_chunks import Text
from moesr.runtime.images.tiff_tags import Tag

log = logging.getLogger("moesr")

_METRE_IN = 0.0254  # meters per inch: some formats count pixels per meter, as whole numbers
_SEGMENT_BYTES = 65_533  # largest content of a JPEG segment
_UNLIMITED = 2**31 - 1
_ALL_TEXTS_BYTES = 32 << 20  # Pillow reads up to 64 MiB in total, including XMP and the record
_PILLOW_TEXT_BYTES = 1 << 20  # Pillow cannot read a PNG with a longer compressed text or profile


@dataclass(frozen=True)
class Metadata:
    """The metadata of a file. Pixels are upright, so there is no orientation."""

    icc: bytes | None = None  # color profile
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None  # pixels per inch, across and down
    xmp: bytes | None = None
    iptc: bytes | None = None  # IIM records
    texts: tuple[Text, ...] = ()
    comments: tuple[bytes, ...] = ()
    color: tuple[tuple[bytes, bytes], ...] = ()  # color tags as chunks of a PNG
    tags: Mapping[int, Tag] = field(default_factory=dict)  # georeference and colors of a TIFF


@dataclass(frozen=True)
class Capacity:
    """The largest size of each kind of metadata in a format, in bytes; 0 if it cannot hold that kind."""

    icc: int = 0
    exif: int = 0
    xmp: int = 0
    iptc: int = 0
    text: int = 0  # of each text and comment
    text_as: Literal["chunks", "segments", "description", ""] = ""
    dpi: tuple[float, float] = (math.inf, 0.0)  # lowest and highest value that can be written
    dpi_in_exif: bool = False
    color: bool = False  # color tags
    tags: bool = False  # georeference


CAPACITIES = {
    "PNG": Capacity(
        icc=_PILLOW_TEXT_BYTES,
        exif=_UNLIMITED,
        xmp=_PILLOW_TEXT_BYTES,
        iptc=_PILLOW_TEXT_BYTES // 4,  # stored as hexadecimal text
        text=_PILLOW_TEXT_BYTES,
        text_as="chunks",
        dpi=(0.5 * _METRE_IN, _UNLIMITED * _METRE_IN),
        color=True,
    ),
    "JPEG": Capacity(
        icc=255 * (_SEGMENT_BYTES - 14),
        exif=_SEGMENT_BYTES,
        xmp=_SEGMENT_BYTES - 29,
        iptc=_SEGMENT_BYTES - 27,
        text=_SEGMENT_BYTES,
        text_as="segments",
        dpi=(0.5, 65_535),
    ),
    "WEBP": Capacity(
        icc=_UNLIMITED,
        exif=_UNLIMITED,
        xmp=_UNLIMITED,
        text=_UNLIMITED,
        text_as="description",
        dpi=(1e-3, 4e9),
        dpi_in_exif=True,
    ),
    "TIFF": Capacity(
        icc=_UNLIMITED,
        exif=_UNLIMITED,
        xmp=_UNLIMITED,
        iptc=_UNLIMITED,
        text=_UNLIMITED,
        text_as="description",
        dpi=(1e-3, 4e9),
        tags=True,
    ),
    "BMP": Capacity(dpi=(0.5 * _METRE_IN, _UNLIMITED * _METRE_IN)),
}
"""The metadata that each written format can hold, by Pillow's name of the format."""


def resolution(dpi: object) -> tuple[float, float] | None:
    """Return a resolution as two finite positive numbers; None for other values (0/0, infinite, negative)."""
    if not isinstance(dpi, (tuple, list)) or len(dpi) != 2:
        return None
    try:
        across, down = float(dpi[0]), float(dpi[1])
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return (across, down) if all(math.isfinite(v) and v > 0 for v in (across, down)) else None


def resized(metadata: Metadata, before: tuple[int, int], after: tuple[int, int]) -> Metadata:
    """Return the metadata of an image whose size, (width, height), changes from `before` to `after`.

    The image keeps its size on paper and on the map: it has more pixels per inch, and each covers less
    ground.
    """
    x, y = after[0] / before[0], after[1] / before[1]
    m = metadata
    return replace(
        m,
        exif=exif.resized(m.exif, *after, x, y),
        dpi=(m.dpi[0] * x, m.dpi[1] * y) if m.dpi else None,
        xmp=xmp.resized(m.xmp, x, y) if m.xmp else None,
        tags=tiff_tags.resized(m.tags, x, y) if m.tags else m.tags,
    )


def fitted(metadata: Metadata, format_name: str, name: str, *, grey: bool) -> Metadata:
    """Return the metadata that a format can hold; a warning for file `name` says what is left out.

    The color profile is kept, because the pixels can be converted instead. Color tags become a profile if the
    format has no place for them.
    """
    capacity, lost = CAPACITIES[format_name], []
    m = _with_color(metadata, capacity, grey, lost)
    m = _with_texts(m, capacity, lost)
    m = _with_resolution(m, capacity, lost)
    if m.exif and len(m.exif) > capacity.exif:
        short = exif.shortened(m.exif, capacity.exif) if capacity.exif else None
        lost.append("all of its EXIF data" if short else "its EXIF data")
        m = replace(m, exif=short)
    if m.xmp and len(m.xmp) > capacity.xmp:
        lost.append("its XMP data")
        m = replace(m, xmp=None)
    if m.iptc and len(m.iptc) > capacity.iptc:
        lost.append("its IPTC data")
        m = replace(m, iptc=None)
    if m.tags and not capacity.tags:
        if tiff_tags.GEO & set(m.tags):
            lost.append("its georeference (TIFF can)")
        m = replace(m, tags={})
    if lost:
        log.warning("%s: %s cannot hold %s", name, format_name, ", ".join(lost))
    return m


def _with_color(m: Metadata, capacity: Capacity, grey: bool, lost: list[str]) -> Metadata:
    if not m.color or capacity.color:
        return m
    tags = dict(m.color)
    if icc.is_srgb(tags) or (m.icc and b"cICP" not in tags):  # the default, or replaced by the profile
        return replace(m, color=())
    profile = icc.of_color_tags(tags, grey)
    if profile is None:
        lost.append("its color tags (PNG can)")
    return replace(m, color=(), icc=profile or m.icc)


def _with_resolution(m: Metadata, capacity: Capacity, lost: list[str]) -> Metadata:
    if m.dpi is None:
        return m
    low, high = capacity.dpi
    if not all(low <= value <= high for value in m.dpi):
        lost.append(f"a resolution of {m.dpi[0]:g} x {m.dpi[1]:g} dpi")
        return replace(m, dpi=None)
    if capacity.dpi_in_exif:
        return replace(m, dpi=None, exif=exif.with_resolution(m.exif, m.dpi))
    return m


def _with_texts(m: Metadata, capacity: Capacity, lost: list[str]) -> Metadata:
    """Return texts and comments in the form of the format."""
    if not m.texts and not m.comments:
        return m
    if capacity.text_as == "chunks":
        texts = (*m.texts, *(Text("Comment", decoded(comment)) for comment in m.comments))
        kept = _up_to(texts, capacity.text)
        lost += [f"the text {text.key!r}, which is too long" for text in texts if text not in kept]
        return replace(m, texts=kept, comments=())
    lines = (*m.comments, *(_line(text).encode() for text in m.texts))
    if capacity.text_as == "segments":
        kept = tuple(line for line in lines if len(line) <= capacity.text)
        lost += [f"a text of {len(line)} bytes" for line in lines if line not in kept]
        return replace(m, texts=(), comments=kept)
    block = None
    if capacity.text_as == "description":
        block = exif.with_description(m.exif, "\n".join(decoded(line) for line in lines))
    if block is None:
        names = [*(["a comment"] if m.comments else []), *(f"the text {text.key!r}" for text in m.texts)]
        lost += names
    return replace(m, texts=(), comments=(), exif=block or m.exif)


def _up_to(texts: tuple[Text, ...], limit_bytes: int) -> tuple[Text, ...]:
    """Return the texts up to the limit of one text, as long as a reader accepts them in total."""
    kept, total = [], 0
    for text in texts:
        size = len(text.value.encode(errors="replace"))
        if size <= limit_bytes and total + size <= _ALL_TEXTS_BYTES:
            kept.append(text)
            total += size
    return tuple(kept)


def _line(text: Text) -> str:
    return text.value if text.key in ("Comment", "Description") else f"{text.key}: {text.value}"


def decoded(comment: bytes) -> str:
    """Return the text of a comment, whose encoding is not declared."""
    try:
        return comment.decode()
    except UnicodeDecodeError:
        return comment.decode("latin-1")
