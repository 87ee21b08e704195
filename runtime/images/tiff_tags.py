"""Tags of TIFF files: which of them describe the image, its place on a map, its pixels, or their storage.

Tag numbers are those of TIFF 6.0, TIFF/EP and GeoTIFF 1.1 (OGC 19-008).
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

DESCRIPTION, SOFTWARE, XMP, IPTC, PHOTOSHOP = 270, 305, 700, 33723, 34377
PAGE_NUMBER = 297
_RESOLUTION = (282, 283, 296)
DESCRIPTIVE = frozenset(
    (269, DESCRIPTION, 271, 272, 285, SOFTWARE, 306, 315, 316, 18246, 18249, 33432, *range(40091, 40096))
).union(_RESOLUTION, (34665, 34853))  # and the directories of EXIF and of the GPS position
"""Tags about the image, which every EXIF block can hold."""

_KEPT_ELSEWHERE = (XMP, IPTC, PHOTOSHOP, 34675)
STORAGE = frozenset(
    (254, 255, *range(256, 267), 273, 274, *range(277, 282), 284, *range(290, 294), 317, *range(320, 335))
).union((336, *range(337, 342), 347, *range(512, 533), 559, 32997, 34925, 37439, 50674), _KEPT_ELSEWHERE)
"""Tags about the storage of pixels, and tags that are kept elsewhere; a new file has its own."""

COLOR = frozenset((318, 319))  # white point and primaries
PIXEL_SCALE, TIE_POINTS, TRANSFORMATION, GEO_KEYS = 33550, 33922, 34264, 34735
GEO = frozenset((PIXEL_SCALE, TIE_POINTS, TRANSFORMATION, GEO_KEYS, 34736, 34737, 42112, 42113))
"""The georeference (and GDAL's metadata), which only TIFF can hold."""

_RASTER_TYPE, _PIXEL_IS_POINT = 1025, 2  # a GeoKey and its value
_NAMES = {
    PAGE_NUMBER: "PageNumber",
    301: "TransferFunction",
    50844: "RPCCoefficient",
    33920: "IntergraphMatrix",
}
_SIZES_IN_TEXT = re.compile(r'^ImageJ=|<OME\b|"shape"\s*:|SizeX\s*=|\bimages=\d', re.MULTILINE)


@dataclass(frozen=True)
class Tag:
    """A tag for a TIFF: its type by TIFF's number, and its value or values."""

    type: int
    value: Any


def name_of(tag: int) -> str:
    """Return the name of a tag for a message."""
    return _NAMES.get(tag, f"tag {tag}")


def describes_pixels(description: str) -> bool:
    """Return True if an ImageDescription holds sizes or page counts, as of ImageJ, OME-XML and tifffile."""
    return bool(_SIZES_IN_TEXT.search(description))


def resized(tags: Mapping[int, Tag], x: float, y: float) -> dict[int, Tag]:
    """Return the georeference of an image enlarged by `x` and `y`: each pixel covers less ground.

    If pixels are points rather than areas (GTRasterTypeGeoKey), positions are measured from the center of the
    first pixel, which moves when the image is enlarged.
    """
    point = _is_point(tags)
    changed = dict(tags)
    for tag, change in (
        (PIXEL_SCALE, _pixel_scale),
        (TIE_POINTS, _tie_points),
        (TRANSFORMATION, _transformation),
    ):
        if tag in tags:
            values = [float(value) for value in _values(tags[tag])]
            changed[tag] = Tag(tags[tag].type, tuple(change(values, x, y, point)))
    return changed


def _values(tag: Tag) -> tuple:
    return tag.value if isinstance(tag.value, tuple) else (tag.value,)


def _is_point(tags: Mapping[int, Tag]) -> bool:
    keys: list = list(_values(tags[GEO_KEYS])) if GEO_KEYS in tags else []
    entries = [keys[i : i + 4] for i in range(4, len(keys) - 3, 4)]
    return any(entry[0] == _RASTER_TYPE and entry[3] == _PIXEL_IS_POINT for entry in entries)


def _pixel_scale(values: list[float], x: float, y: float, point: bool) -> list[float]:
    return [value / factor for value, factor in zip(values, (x, y, 1.0), strict=False)]


def _tie_points(values: list[float], x: float, y: float, point: bool) -> list[float]:
    """Groups of i, j, k, X, Y, Z, where i and j are a column and a row."""
    half = 0.5 if point else 0.0
    for start in range(0, len(values) - 5, 6):
        values[start] = (values[start] + half) * x - half
        values[start + 1] = (values[start + 1] + half) * y - half
    return values


def _transformation(values: list[float], x: float, y: float, point: bool) -> list[float]:
    """Return a 4x4 matrix that maps column, row, 0, 1 to a position."""
    half = 0.5 if point else 0.0
    for row in range(0, len(values) - 3, 4):
        a, b = values[row], values[row + 1]
        values[row], values[row + 1] = a / x, b / y
        values[row + 3] += a * half * (1 / x - 1) + b * half * (1 / y - 1)
    return values


def inverted_photometric(stream: BinaryIO) -> io.BytesIO | None:
    """Return a copy of a TIFF that stores white as zero in more than 8 bits, declared the other way round.

    Pillow reads such files without inverting them, or not at all in the other byte order. The result is None
    for any other file. The position in the stream is restored.
    """
    before = stream.tell()
    try:
        stream.seek(0)
        places = _first_directory(stream)
        photometric, depth = places.get(262), places.get(258)
        if not photometric or not depth or photometric[1] != 0 or depth[1] <= 8:
            return None
        stream.seek(0)
        copy = io.BytesIO(stream.read())
        copy.seek(photometric[0])
        copy.write(struct.pack(photometric[2], 1))
        copy.seek(0)
        return copy
    except struct.error:
        return None
    finally:
        stream.seek(before)


def _first_directory(stream: BinaryIO) -> dict[int, tuple[int, int, str]]:
    """Return position, value and struct format of the SHORT tags in a TIFF's first directory."""
    head = stream.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        return {}
    (version,) = struct.unpack(order + "H", head[2:4])
    big = version == 43
    offset = struct.unpack(order + "Q", head[8:16])[0] if big else struct.unpack(order + "I", head[4:8])[0]
    stream.seek(offset)
    (count,) = struct.unpack(order + ("Q" if big else "H"), stream.read(8 if big else 2))
    size, found = (20 if big else 12), {}
    for _ in range(min(count, 4096)):
        place = stream.tell() + size - (8 if big else 4)
        entry = stream.read(size)
        tag, kind = struct.unpack(order + "HH", entry[:4])
        if kind == 3:
            value = struct.unpack(order + "H", entry[place - stream.tell() :][:2])[0]
            found[tag] = (place, value, order + "H")
    return found
