"""The size of a JPEG XL image, read from its header; Pillow's plugin decodes the whole image to find it."""

from __future__ import annotations

import struct
from typing import BinaryIO

CODESTREAM = b"\xff\x0a"
_SIGNATURE = b"\0\0\0\x0cJXL \r\n\x87\n"
_BITS = (9, 13, 18, 30)  # of a side, by its selector
_RATIOS = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # of width to height
_HEADER_BYTES = 16  # more than the size takes


def jxl_size(stream: BinaryIO) -> tuple[int, int] | None:
    """Return the width and height that a JPEG XL file declares; None if it is no such file.

    ValueError is raised if the file has no codestream. Source: ISO/IEC 18181-1, SizeHeader, and 18181-2.
    """
    stream.seek(0)
    head = stream.read(12)
    if head[:2] == CODESTREAM:
        stream.seek(2)
        return _size(stream.read(_HEADER_BYTES))
    return _size(_codestream(stream)[2:]) if head == _SIGNATURE else None


def _codestream(stream: BinaryIO) -> bytes:
    """Return the first bytes of the codestream in a file of boxes."""
    place = 0
    while True:
        stream.seek(place)
        head = stream.read(16)
        if len(head) < 8:
            raise ValueError("no codestream")
        size, kind, start = struct.unpack(">I", head[:4])[0], head[4:8], 8
        if size == 1 and len(head) == 16:
            size, start = struct.unpack(">Q", head[8:])[0], 16
        if kind in (b"jxlc", b"jxlp"):
            stream.seek(place + start + 4 * (kind == b"jxlp"))  # a part begins with its number
            return stream.read(2 + _HEADER_BYTES)
        if size < start:  # 0: the box is the last one
            raise ValueError("no codestream")
        place += size


def _size(data: bytes) -> tuple[int, int]:
    """Return width and height from a SizeHeader, whose bits are read from the lowest one up."""
    bits = int.from_bytes(data, "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take(_BITS[take(2)]) + 1

    height = side()
    above, below = _RATIOS[take(3)]
    return (height * above // below if above else side()), height
