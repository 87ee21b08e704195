"""EXIF blocks: the tags that are copied to another file, and their changes with the size of the image."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from fractions import Fraction
from typing import Any

from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from moesr.runtime.images import tiff_tags
from moesr.runtime.images.provenance import Provenance, to_software, without_mark

_ORIENTATION, _DETAILS, _POSITION, _INTEROPERABILITY = 0x0112, 0x8769, 0x8825, 0xA005
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 0x011A, 0x011B, 0x0128
_WIDTH, _HEIGHT, _RELATED_WIDTH, _RELATED_HEIGHT = 0xA002, 0xA003, 0x1001, 0x1002
_FOCAL_X, _FOCAL_Y, _SUBJECT_AREA, _SUBJECT_LOCATION = 0xA20E, 0xA20F, 0x9214, 0xA214
_MAKER_NOTE, _USER_COMMENT = 0x927C, 0x9286
_SUB_NAMES = {_DETAILS: "exposure data", _POSITION: "position"}


def read(image: Image.Image) -> tuple[bytes | None, int, list[str]]:
    """Return the EXIF block, the orientation (1 is upright), and names of the parts that were left out.

    The block contains neither the orientation, nor tags of storage, nor our own record. Any error of Pillow's
    means that the block is damaged.
    """
    exif = Image.Image.getexif(image)  # for a PNG, Pillow would decode the image first
    turn = int(exif.get(_ORIENTATION, 1))
    copy = _copied(exif)
    left_out = _without_foreign_tags(copy, is_tiff=image.format == "TIFF")
    if turn != 1 and _DETAILS in copy:
        left_out += _without(copy.get_ifd(_DETAILS), {_SUBJECT_AREA: "SubjectArea"})
    software = copy.get(tiff_tags.SOFTWARE)
    if isinstance(software, str):
        copy[tiff_tags.SOFTWARE] = without_mark(software)
        if not copy[tiff_tags.SOFTWARE]:
            del copy[tiff_tags.SOFTWARE]
    return (_packed(copy) if len(copy) else None), turn, left_out


def _copied(exif: Image.Exif) -> Image.Exif:
    """Return a copy of the block of an open image, whose own values stay unchanged."""
    directories = _directories(exif)
    before = [dict(ifd) for ifd in directories]
    for ifd in directories:
        _texts_to_bytes(ifd)
    big, exif.bigtiff = exif.bigtiff, False  # a block has the offsets of a usual TIFF
    packed = exif.tobytes()
    exif.bigtiff = big
    for ifd, values in zip(directories, before, strict=True):
        for tag, value in values.items():
            if isinstance(value, str):
                ifd[tag] = value
    return _loaded(packed)


def _without_foreign_tags(block: Image.Exif, is_tiff: bool) -> list[str]:
    """Delete tags that describe the storage of the pixels, or may do so; returns names for a message."""
    left_out = []
    for tag in sorted(block):
        if tag in tiff_tags.STORAGE or tag in tiff_tags.GEO | tiff_tags.COLOR:
            del block[tag]
        elif tag == tiff_tags.DESCRIPTION and tiff_tags.describes_pixels(str(block[tag])):
            left_out.append("a description with sizes in pixels or page counts")
            del block[tag]
        elif tag == tiff_tags.PAGE_NUMBER or (is_tiff and tag not in tiff_tags.DESCRIPTIVE):
            left_out.append(tiff_tags.name_of(tag))
            del block[tag]
    return left_out


def _without(ifd: MutableMapping[int, Any], names: dict[int, str]) -> list[str]:
    found = [tag for tag in names if tag in ifd]
    for tag in found:
        del ifd[tag]
    return [names[tag] for tag in found]


def resized(exif: bytes | None, width: int, height: int, x: float = 1.0, y: float = 1.0) -> bytes | None:
    """Return the EXIF block of an image enlarged by `x` and `y` to `width` x `height`.

    Its sizes, positions and resolutions are changed.
    """
    if not exif:
        return None
    block = _loaded(exif)
    _scale(block, {_X_RESOLUTION: x, _Y_RESOLUTION: y})
    if _DETAILS in block:
        details = block.get_ifd(_DETAILS)
        _replace(details, {_WIDTH: width, _HEIGHT: height})
        _scale(details, {_FOCAL_X: x, _FOCAL_Y: y})
        _scale_places(details, x, y)
        if _INTEROPERABILITY in details:
            _replace(block.get_ifd(_INTEROPERABILITY), {_RELATED_WIDTH: width, _RELATED_HEIGHT: height})
    return _packed(block)


def _replace(ifd: MutableMapping[int, Any], values: dict[int, int]) -> None:
    for tag, value in values.items():
        if tag in ifd:
            ifd[tag] = value


def _scale(ifd: MutableMapping[int, Any], factors: dict[int, float]) -> None:
    """Multiply resolutions; a value that is not a valid number (0/0, or too large) is deleted."""
    for tag, factor in factors.items():
        if tag not in ifd:
            continue
        try:
            value = float(ifd[tag]) * factor
        except (TypeError, ValueError, ZeroDivisionError, OverflowError):
            value = math.nan
        if not math.isfinite(value) or not 0 < value < 2**31:
            del ifd[tag]
        elif factor != 1.0:
            ifd[tag] = _rational(value)


def _rational(value: float) -> IFDRational:
    """Return the fraction of 32-bit numbers that is closest to a positive number."""
    fraction = Fraction(value).limit_denominator(max(1, int(2**31 / max(value, 1.0))))
    return IFDRational(fraction.numerator, fraction.denominator)


def _scale_places(details: MutableMapping[int, Any], x: float, y: float) -> None:
    """Scale the subject: column, row, and the diameter of a circle or the width and height of a rectangle."""
    for tag in (_SUBJECT_AREA, _SUBJECT_LOCATION):
        values = details.get(tag)
        if not isinstance(values, tuple) or not 2 <= len(values) <= 4:
            continue
        factors = (x, y, x, y) if len(values) == 4 else (x, y, math.sqrt(x * y))
        scaled = [round(int(value) * factor) for value, factor in zip(values, factors, strict=False)]
        if max(scaled) < 2**16:
            details[tag] = tuple(scaled)
        else:
            del details[tag]


def marked(exif: bytes | None, record: Provenance) -> bytes:
    """Return EXIF whose Software tag also holds `record`."""
    block = _loaded(exif)
    block[tiff_tags.SOFTWARE] = to_software(block.get(tiff_tags.SOFTWARE), record)
    return _packed(block)


def with_description(exif: bytes | None, text: str) -> bytes | None:
    """Return EXIF with a description; None if it already has one."""
    block = _loaded(exif)
    if block.get(tiff_tags.DESCRIPTION):
        return None
    block[tiff_tags.DESCRIPTION] = text.encode()
    return _packed(block)


def with_resolution(exif: bytes | None, dpi: tuple[float, float]) -> bytes:
    """Return EXIF with a resolution in pixels per inch, unless it has one."""
    block = _loaded(exif)
    if _X_RESOLUTION not in block:
        for tag, value in zip((_X_RESOLUTION, _Y_RESOLUTION), dpi, strict=True):
            block[tag] = _rational(value)
        block[_RESOLUTION_UNIT] = 2
    return _packed(block)


def shortened(exif: bytes, limit_bytes: int) -> bytes | None:
    """Return EXIF without the maker's note and the user's comment if it then fits; None if it does not."""
    block = _loaded(exif)
    for tag in (_MAKER_NOTE, _USER_COMMENT):
        if _DETAILS in block:
            block.get_ifd(_DETAILS).pop(tag, None)
        packed = _packed(block)
        if len(packed) <= limit_bytes:
            return packed
    return None


def for_tiff(exif: bytes) -> tuple[Image.Exif, list[str]]:
    """Return EXIF without the sub-directories that compressed TIFFs cannot hold, and their names."""
    block = _loaded(exif)
    lost = [tag for tag in _SUB_NAMES if tag in block]
    for tag in lost:
        del block[tag]
    return block, [f"the EXIF block's {_SUB_NAMES[tag]}" for tag in lost]


def _loaded(exif: bytes | None) -> Image.Exif:
    block = Image.Exif()
    if exif:
        block.load(exif)
    for ifd in _directories(block):
        _texts_to_bytes(ifd)
    return block


def _packed(block: Image.Exif) -> bytes:
    for ifd in _directories(block):
        _texts_to_bytes(ifd)
    return block.tobytes()


def _directories(block: Image.Exif) -> list[MutableMapping[int, Any]]:
    found: list[MutableMapping[int, Any]] = [block]
    found += [block.get_ifd(tag) for tag in (_DETAILS, _POSITION) if tag in block]
    return found


def _texts_to_bytes(ifd: MutableMapping[int, Any]) -> None:
    """Convert texts beyond ASCII to their original bytes; Pillow would write question marks."""
    for tag, value in list(ifd.items()):
        if isinstance(value, str) and not value.isascii():
            ifd[tag] = _bytes_of(value)


def _bytes_of(text: str) -> bytes:
    try:
        return text.encode("latin-1")  # the encoding in which Pillow reads texts
    except UnicodeEncodeError:
        return text.encode()
