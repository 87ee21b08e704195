"""XMP packets: sizes and positions in pixels follow the image, and the orientation becomes upright.

XMP is RDF in XML (ISO 16684-1). A property is either an attribute, `GPano:FullPanoWidthPixels="32"`, or an
element. Values are replaced in the text; all other bytes stay the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_GPANO = "http://ns.google.com/photos/1.0/panorama/"
_TIFF = "http://ns.adobe.com/tiff/1.0/"
_EXIF = "http://ns.adobe.com/exif/1.0/"
_EXIF_EX = "http://cipa.jp/exif/1.0/"
_DIMENSIONS = "http://ns.adobe.com/xap/1.0/sType/Dimensions#"
_GAIN_MAP = "http://ns.adobe.com/hdr-gain-map/1.0/"

_ACROSS = (
    (_GPANO, "FullPanoWidthPixels CroppedAreaImageWidthPixels CroppedAreaLeftPixels "),
    (_GPANO, "LargestValidInteriorRectLeft LargestValidInteriorRectWidth SourceImageWidthPixels"),
    (_TIFF, "ImageWidth XResolution"),
    (_EXIF, "PixelXDimension FocalPlaneXResolution"),
    (_EXIF_EX, "PixelXDimension"),
)
_DOWN = (
    (_GPANO, "FullPanoHeightPixels CroppedAreaImageHeightPixels CroppedAreaTopPixels"),
    (_GPANO, "LargestValidInteriorRectTop LargestValidInteriorRectHeight SourceImageHeightPixels"),
    (_TIFF, "ImageLength YResolution"),
    (_EXIF, "PixelYDimension FocalPlaneYResolution"),
    (_EXIF_EX, "PixelYDimension"),
)
_APPLIED = re.compile(r"AppliedToDimensions\b[^<>]*(?:/?>|>.*?AppliedToDimensions>)", re.DOTALL)


def decoded(packet: bytes) -> str | None:
    """Return the text of a packet in UTF-8, UTF-16 or UTF-32; None for any other encoding."""
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        try:
            text = packet.decode(encoding)
        except (UnicodeDecodeError, UnicodeError):
            continue
        if "<" in text:
            return text
    return None


def upright(packet: bytes) -> bytes:
    """Return the packet with an orientation of 1, which pixels have once they are turned upright."""
    return _replaced(packet, [(_TIFF, "Orientation", lambda _: "1")])


def resized(packet: bytes, x: float, y: float) -> bytes:
    """Return the packet with sizes and positions in pixels multiplied by `x` across and `y` down."""
    changes = []
    for table, factor in ((_ACROSS, x), (_DOWN, y)):
        changes += [(space, name, _multiply(factor)) for space, names in table for name in names.split()]
    return _replaced(packet, changes, _scaled_dimensions(x, y))


def needs_other_parts(packet: bytes) -> bool:
    """Return True if the packet refers to data outside of it (extended XMP, or a second image)."""
    return b"HasExtendedXMP" in packet or _GAIN_MAP.encode() in packet


def _replaced(
    packet: bytes,
    changes: list[tuple[str, str, Callable[[str], str]]],
    also: Callable[[str, dict[str, str]], str] | None = None,
) -> bytes:
    text = decoded(packet)
    if text is None:
        return packet
    prefixes = {
        space: prefix for prefix, space in re.findall(r"""xmlns:([\w.-]+)\s*=\s*["']([^"']+)""", text)
    }
    changed = text
    for space, name, change in changes:
        if space in prefixes:
            changed = _property(changed, f"{prefixes[space]}:{name}", change)
    if also:
        changed = also(changed, prefixes)
    return packet if changed == text else changed.encode()


def _property(text: str, name: str, change: Callable[[str], str]) -> str:
    """Return `text` with the value of a property changed, which is an attribute or an element."""
    attribute = rf"""((?<![\w:.-]){re.escape(name)}\s*=\s*["'])([^"']*)"""
    element = rf"(<{re.escape(name)}(?:\s[^<>]*)?>)([^<>]*)(?=</{re.escape(name)})"
    for pattern in (attribute, element):
        text = re.sub(pattern, lambda found: found[1] + change(found[2]), text)
    return text


def _multiply(factor: float) -> Callable[[str], str]:
    """Multiply an integer, a decimal or a fraction; any other text is kept."""

    def change(value: str) -> str:
        fraction = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*(/\s*\d+)?\s*", value)
        if not fraction:
            return value
        number = float(fraction[1]) * factor
        whole = "." not in fraction[1] or number == round(number)
        return f"{round(number) if whole else number}{fraction[2] or ''}"

    return change


def _scaled_dimensions(x: float, y: float) -> Callable[[str, dict[str, str]], str]:
    """Scale the size to which face regions (Metadata Working Group) are relative."""

    def change(text: str, prefixes: dict[str, str]) -> str:
        prefix = prefixes.get(_DIMENSIONS)
        if prefix is None:
            return text

        def scaled(found: re.Match[str]) -> str:
            part = _property(found[0], f"{prefix}:w", _multiply(x))
            return _property(part, f"{prefix}:h", _multiply(y))

        return _APPLIED.sub(scaled, text)

    return change
