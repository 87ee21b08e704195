"""Reading of messages in the wire format of Protocol Buffers, without their library.

A message is a list of fields. Each field has a key (number and kind) and a value, and a nested message is a
field with a length.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Kinds of values: a number of any length, eight bytes, bytes after their length, and four bytes."""

MAX_NESTING = 100
"""Deeper nesting of messages is refused; the readers of Protocol Buffers also refuse more than 100 levels."""

_LENGTHS = {FIXED64: 8, FIXED32: 4}


def fields(data: bytes | mmap.mmap, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number, kind, start, stop) of the value of every field between two positions.

    Raises ValueError or IndexError if the data are not in this format.
    """
    while at < stop:
        key, at = varint(data, at)
        kind = key & 7
        if kind == VARINT:
            _, end = varint(data, at)
        elif kind == BYTES:
            length, at = varint(data, at)
            end = at + length
        elif kind in _LENGTHS:
            end = at + _LENGTHS[kind]
        else:
            raise ValueError(f"unknown kind of field {kind}")
        if end > stop:
            raise ValueError("a field is longer than its message")
        yield key >> 3, kind, at, end
        at = end


def varint(data: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    """Return a number that is stored with seven bits per byte, lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
