"""Reading the metadata of an open image from the places where its format stores them."""

from __future__ import annotations

import io
import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from PIL import Image

from moesr.runtime.images import exif, png_chunks, tiff_tags, xmp
from moesr.runtime.images.formats import brief
from moesr.runtime.images.metadata import Metadata, resolution
from moesr.runtime.images.png_chunks import Text
from moesr.runtime.images.provenance import KEY, is_record
from moesr.runtime.images.tiff_tags import Tag

log = logging.getLogger("moesr")

XMP_KEYWORD = "XML:com.adobe.xmp"
XMP_SEGMENT, XMP_EXTENSION = b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0"
IPTC_RESOURCE = 0x0404
_RAW_PROFILE = re.compile(r"raw profile type (\w+)", re.IGNORECASE)
_SIZE_TEXT = re.compile(
    r"(exif|tiff):(orientation|(exif)?image(width|length|height)|pixel[xy]dimension|[xy]resolution)"
    r"|thumb::image::(width|height)",
    re.IGNORECASE,
)
_JP2_XMP = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
_JP2_IPTC = bytes.fromhex("33c7a4d2b81d4723a0baf1a3e097ad38")


@dataclass
class _Found:
    """The results of one reader: fields of `Metadata`, and names of the parts that were left out."""

    values: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def read(image: Image.Image, name: str, source: BinaryIO | None = None) -> tuple[Metadata, int]:
    """Return the metadata of an image that is not decoded yet, and its orientation (1 is upright).

    `source` is the file, if the image was opened from a copy without its texts. Damaged parts are left out
    with a warning that names the file.
    """
    found = _Found()
    reader = _READERS.get(image.format or "", _read_info)
    try:
        reader(image, source or _stream_of(image), found)
    except Exception as error:  # a damaged part may hold anything; the pixels can be used without it
        log.warning("%s: some of its metadata is damaged and left out (%s)", name, brief(error))
    block, turn = None, 1
    try:
        block, turn, left_out = exif.read(image)
        found.left_out += left_out
    except Exception as error:  # as above
        log.warning("%s: its EXIF block is damaged and left out (%s)", name, brief(error))
    dpi = image.info.get("dpi")
    if image.format == "TIFF" and 282 not in image.tag_v2:  # type: ignore[attr-defined]
        dpi = None  # Pillow reports one pixel per inch for a file without a resolution
    metadata = Metadata(icc=image.info.get("icc_profile") or None, exif=block, dpi=resolution(dpi))
    metadata = _turned(replace(metadata, **found.values), turn)
    if dpi and metadata.dpi is None and dpi != (0, 0):
        found.left_out.append(f"a resolution of {dpi}")
    if found.left_out:
        log.warning("%s: left out of the result: %s", name, ", ".join(dict.fromkeys(found.left_out)))
    return metadata, turn


def _turned(m: Metadata, turn: int) -> Metadata:
    dpi = m.dpi[::-1] if m.dpi and turn >= 5 else m.dpi  # rows have become columns
    return replace(m, dpi=dpi, xmp=xmp.upright(m.xmp) if m.xmp else None)


def _stream_of(image: Image.Image) -> BinaryIO | None:
    """Return the open file of an image if it is seekable."""
    stream = getattr(image, "fp", None)
    if stream is None or getattr(stream, "closed", False) or not hasattr(stream, "seek"):
        return None
    return stream


def _keep_xmp(packet: bytes | str | None, found: _Found) -> None:
    if not packet:
        return
    data = packet.encode() if isinstance(packet, str) else bytes(packet)
    data = data.strip(b"\0")
    if xmp.needs_other_parts(data):
        found.left_out.append("the parts of its XMP data outside of the packet")
    found.values["xmp"] = data


def _keep_comment(comment: Any, found: _Found) -> None:
    data = comment.encode() if isinstance(comment, str) else comment
    if isinstance(data, bytes) and data.strip(b"\0 ") and not is_record(data):
        found.values["comments"] = (*found.values.get("comments", ()), data)


def _read_info(image: Image.Image, stream: BinaryIO | None, found: _Found) -> None:
    """Read formats whose metadata Pillow or its plug-ins store in `info`: WebP, AVIF, HEIC, JPEG XL, TGA."""
    _keep_xmp(image.info.get("xmp"), found)
    _keep_comment(image.info.get("comment") or image.info.get("id_section"), found)


def _read_png(image: Image.Image, stream: BinaryIO | None, found: _Found) -> None:
    if stream is None:
        texts = getattr(image, "text", {})
        parts = [
            Text(key, str(value), getattr(value, "lang", "") or "", getattr(value, "tkey", "") or "")
            for key, value in texts.items()
        ]
        color: tuple[tuple[bytes, bytes], ...] = ()
        gamma = image.info.get("gamma")
        if isinstance(gamma, float):
            color = ((b"gAMA", struct.pack(">I", round(gamma * 100_000))),)
    else:
        contents = png_chunks.contents(stream)
        parts, color = list(contents.texts), contents.color
        found.left_out += [f"a damaged or too large chunk {kind}" for kind in contents.skipped]
        if contents.icc:
            found.values["icc"] = contents.icc
        if contents.exif:
            image.info.setdefault("exif", b"Exif\0\0" + contents.exif)
    found.values["color"] = color
    kept = []
    for text in parts:
        profile = _RAW_PROFILE.fullmatch(text.key)
        if text.key == XMP_KEYWORD:
            _keep_xmp(text.value, found)
        elif profile:
            _keep_raw_profile(profile[1].lower(), text.value, found)
        elif _SIZE_TEXT.fullmatch(text.key):
            found.left_out.append(text.key)
        elif text.key != KEY:
            kept.append(text)
    found.values["texts"] = tuple(kept)


def _keep_raw_profile(kind: str, text: str, found: _Found) -> None:
    """Read ImageMagick's form of other metadata in a PNG: a name, a length, and hexadecimal digits."""
    data = bytes.fromhex("".join(text.split("\n")[3:]))
    if kind in ("iptc", "8bim"):
        _keep_iptc(_resource(data.removeprefix(b"Photoshop 3.0\0"), IPTC_RESOURCE) or data, found)
    elif kind == "xmp" and "xmp" not in found.values:
        _keep_xmp(data, found)


def _keep_iptc(records: Any, found: _Found) -> None:
    if isinstance(records, bytes) and records.startswith(b"\x1c"):
        found.values["iptc"] = records


def _resource(data: bytes, wanted: int) -> bytes | None:
    """Return the content of one of Photoshop's image resources."""
    place = 0
    while data[place : place + 4] == b"8BIM":
        number, length_of_name = struct.unpack(">HB", data[place + 4 : place + 7])
        place += 6 + (length_of_name + 2) // 2 * 2
        (size,) = struct.unpack(">I", data[place : place + 4])
        if number == wanted:
            return data[place + 4 : place + 4 + size]
        place += 4 + (size + 1) // 2 * 2
    return None


def _read_jpeg(image: Image.Image, stream: BinaryIO | None, found: _Found) -> None:
    for marker, data in getattr(image, "applist", ()):
        if marker == "COM":
            _keep_comment(data, found)
        elif marker == "APP1" and data.startswith(XMP_SEGMENT):
            _keep_xmp(data.removeprefix(XMP_SEGMENT), found)
        elif marker == "APP1" and data.startswith(XMP_EXTENSION):
            found.left_out.append("extended XMP data")
        elif marker == "APP13" and data.startswith(b"Photoshop 3.0\0"):
            _keep_iptc(_resource(data[14:], IPTC_RESOURCE), found)


def _read_tiff(image: Image.Image, stream: BinaryIO | None, found: _Found) -> None:
    ifd = image.tag_v2  # type: ignore[attr-defined]
    tags = {}
    for tag in sorted((tiff_tags.GEO | tiff_tags.COLOR) & set(ifd)):
        value = ifd[tag]
        tags[tag] = Tag(ifd.tagtype.get(tag, 2), value)
    found.values["tags"] = tags
    _keep_xmp(_raw(ifd.get(tiff_tags.XMP)), found)
    records = _raw(ifd.get(tiff_tags.IPTC))
    if ifd.tagtype.get(tiff_tags.IPTC) == 4 and isinstance(ifd.get(tiff_tags.IPTC), (tuple, int)):
        values = ifd[tiff_tags.IPTC]  # bytes that were declared as 32-bit numbers
        values = values if isinstance(values, tuple) else (values,)
        order = "<" if ifd._endian == "<" else ">"
        records = struct.pack(f"{order}{len(values)}I", *values).rstrip(b"\0")
    _keep_iptc(records, found)
    resources = _raw(ifd.get(tiff_tags.PHOTOSHOP))
    if "iptc" not in found.values and resources:
        _keep_iptc(_resource(resources, IPTC_RESOURCE), found)


def _raw(value: Any) -> bytes | None:
    """Return the bytes of a TIFF tag for which Pillow returns bytes, text or a tuple."""
    if isinstance(value, tuple) and value and isinstance(value[0], bytes):
        value = value[0]
    if isinstance(value, tuple) and all(isinstance(v, int) and 0 <= v < 256 for v in value):
        value = bytes(value)
    return (
        value.encode("latin-1", "replace")
        if isinstance(value, str)
        else value
        if isinstance(value, bytes)
        else None
    )


def _read_gif(image: Image.Image, stream: BinaryIO | None, found: _Found) -> None:
    _keep_comment(image.info.get("comment"), found)
    if stream is None:
        return
    before = stream.tell()
    stream.seek(0)
    data = stream.read(64 << 20)
    stream.seek(before)
    _, block, rest = data.partition(b"\x21\xff\x0bXMP DataXMP")
    packet, trailer, _ = rest.partition(b"\x01\xff\xfe\xfd")
    if block and trailer:
        _keep_xmp(packet, found)


def _read_jpeg_2000(image: Image.Image, stream: BinaryIO | None, found: _Found) -> None:
    _keep_comment(image.info.get("comment"), found)
    if stream is None:
        return
    before = stream.tell()
    try:
        for kind, data in _boxes(stream):
            if kind == b"uuid" and data.startswith(_JP2_XMP):
                _keep_xmp(data[16:], found)
            elif kind == b"uuid" and data.startswith(_JP2_IPTC):
                _keep_iptc(data[16:], found)
            elif kind == b"xml ":
                found.left_out.append("an XML box")
    finally:
        stream.seek(before)


def _boxes(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield types and contents of the boxes at the top level of a JP2 file, except those of pixels."""
    stream.seek(0)
    while len(head := stream.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        length = size - 8
        if size == 1:
            length = struct.unpack(">Q", stream.read(8))[0] - 16
        if size == 0 or length < 0:
            return
        place = stream.tell()
        if kind in (b"uuid", b"xml ") and length <= png_chunks.MAX_DECOMPRESSED_BYTES:
            yield kind, stream.read(length)
        stream.seek(place + length, io.SEEK_SET)


_READERS = {
    "PNG": _read_png,
    "JPEG": _read_jpeg,
    "MPO": _read_jpeg,
    "TIFF": _read_tiff,
    "GIF": _read_gif,
    "JPEG2000": _read_jpeg_2000,
}
