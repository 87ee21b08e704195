"""Which other files an ONNX file draws its weights from, read without the onnx library.

A file in Protocol Buffers' wire format is a list of fields, each a key (number and kind) and a value; nested
messages are fields with a length. So everything that is not on the way to a tensor can be stepped over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from moesr.runtime.errors import EngineError

# Fields that lead to tensors, by message: number -> message. Numbers are those of onnx.proto.
_PATHS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # kinds of values


def external_files(path: Path) -> set[str]:
    """Locations, as written, of the weights that an ONNX file keeps elsewhere; empty where it keeps none.

    Raises EngineError where the file is not in the format of ONNX.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_locations(data, 0, len(data), "Model"))
    except (ValueError, IndexError) as error:  # an empty file cannot be mapped
        raise EngineError(f"{path}: not an ONNX file; export the engine again with moesr-export") from error


def _locations(data: mmap.mmap, start: int, stop: int, message: str) -> Iterator[str]:
    if message == "Entry":
        entry = {number: data[a:b] for number, a, b in _fields(data, start, stop)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode("utf-8", "replace")
        return
    inner = _PATHS[message]
    for number, a, b in _fields(data, start, stop):
        if number in inner:
            yield from _locations(data, a, b, inner[number])


def _fields(data: mmap.mmap, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of every field with a length between two positions."""
    while at < stop:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _BYTES:
            length, at = _varint(data, at)
            if at + length > stop:
                raise ValueError("a field is longer than its message")
            yield key >> 3, at, at + length
            at += length
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"unknown kind of field {kind}")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
