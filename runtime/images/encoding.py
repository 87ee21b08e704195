"""Writing metadata through the options of Pillow's encoders, together with our own record."""

from __future__ import annotations

import struct
from typing import Any

from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from moesr.runtime.images import exif, tiff_tags
from moesr.runtime.images.embedded import IPTC_RESOURCE, XMP_KEYWORD, XMP_SEGMENT
from moesr.runtime.images.metadata import Metadata
from moesr.runtime.images.provenance import KEY, Provenance

_APP1, _APP13, _COM = 0xE1, 0xED, 0xFE  # markers of JPEG segments
_BYTE, _UNDEFINED = 1, 7  # types of TIFF tags


def options(m: Metadata, format_name: str, record: Provenance | None) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of `Image.save` for a format, and names of metadata that it could not hold.

    `m` has been fitted to the format.
    """
    values: dict[str, Any] = {"icc_profile": m.icc}
    if m.dpi:
        values["dpi"] = m.dpi
    if format_name == "PNG":
        return values | _png(m, record), []
    if format_name == "JPEG":
        return values | _jpeg(m, record), []
    if format_name == "BMP":
        return values, []
    block = exif.marked(m.exif, record) if record else m.exif
    if format_name == "TIFF":
        tags, lost = tiff_tags_of(m, block)
        return values | ({"tiffinfo": tags} if tags else {}), lost
    values |= {"exif": block} if block else {}
    return values | ({"xmp": m.xmp} if m.xmp else {}), []


def _png(m: Metadata, record: Provenance | None) -> dict[str, Any]:
    return {"pnginfo": png_texts(m, record)} | ({"exif": m.exif} if m.exif else {})


def png_texts(m: Metadata, record: Provenance | None) -> PngInfo:
    """Return the text chunks of a PNG: the record, texts, XMP and IPTC."""
    chunks = PngInfo()
    if record:
        chunks.add_text(KEY, record.to_json())
    for text in m.texts:
        if text.language or text.translated:
            chunks.add_itxt(text.key, text.value, text.language, text.translated)
        else:
            chunks.add_text(text.key, text.value)  # as iTXt unless it is Latin-1
    if m.xmp:
        chunks.add_itxt(XMP_KEYWORD, m.xmp.decode("utf-8", "replace"))
    if m.iptc:
        data = resources(m.iptc)
        digits = data.hex()
        lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
        chunks.add_text("Raw profile type iptc", f"\niptc\n{len(data):8d}\n{lines}\n")
    return chunks


def _jpeg(m: Metadata, record: Provenance | None) -> dict[str, Any]:
    return {"extra": jpeg_segments(m, record)} | ({"exif": m.exif} if m.exif else {})


def jpeg_segments(m: Metadata, record: Provenance | None) -> bytes:
    """Return the segments of a JPEG for XMP, IPTC, comments and the record."""
    segments = b""
    if m.xmp:
        segments += segment(_APP1, XMP_SEGMENT + m.xmp)
    if m.iptc:
        segments += segment(_APP13, b"Photoshop 3.0\0" + resources(m.iptc))
    if record:
        segments += segment(_COM, f"{KEY} {record.to_json()}".encode())
    for comment in m.comments:  # after the record, since many programs show the last comment
        segments += segment(_COM, comment)
    return segments


def segment(marker: int, data: bytes) -> bytes:
    """Return a segment of a JPEG with its length."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def resources(records: bytes) -> bytes:
    """Return IPTC records as one of Photoshop's image resources."""
    return b"8BIM" + struct.pack(">HHI", IPTC_RESOURCE, 0, len(records)) + records + bytes(len(records) % 2)


def tiff_tags_of(m: Metadata, block: bytes | None) -> tuple[ImageFileDirectory_v2, list[str]]:
    """Return the tags of a TIFF besides those of its storage, and names of metadata that it cannot hold."""
    tags, lost = ImageFileDirectory_v2(), []
    if block:
        values, lost = exif.for_tiff(block)
        for tag, value in values.items():
            tags[tag] = value
    for tag, entry in m.tags.items():
        tags.tagtype[tag] = entry.type
        tags[tag] = entry.value
    for tag, data, kind in ((tiff_tags.XMP, m.xmp, _BYTE), (tiff_tags.IPTC, m.iptc, _UNDEFINED)):
        if data:
            tags.tagtype[tag] = kind
            tags[tag] = data
    return tags, lost
