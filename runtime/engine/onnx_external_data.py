"""Finding the files in which an ONNX file keeps its external weights, without the onnx library.

A file in the wire format of Protocol Buffers is a list of fields. Each field has a key (number and kind) and
a value, and a nested message is a field with a length, so every field that cannot hold a tensor is skipped.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from moesr.runtime.errors import EngineError
from moesr.runtime.system.files import reason

# Fields that lead to tensors, by message: field number of onnx.proto -> message inside it.
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

MAX_NESTING = 100
"""Deeper nesting of messages is refused; the readers of Protocol Buffers also refuse more than 100 levels."""


def external_files(path: Path) -> set[str]:
    """Return the locations, as written, of the external weights of an ONNX file; empty if it has none.

    Raises EngineError if the file cannot be read or is not in the format of ONNX.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_locations(data, 0, len(data), "Model", MAX_NESTING))
    except (ValueError, IndexError) as error:  # an empty file cannot be mapped
        raise EngineError(
            f"{path}: not an ONNX file ({error}); export the engine again with moesr-export"
        ) from error
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({reason(error)})") from error


def _locations(data: mmap.mmap, start: int, stop: int, message: str, levels: int) -> Iterator[str]:
    """Return the locations below one message, which may contain this many levels of nested messages."""
    if not levels:
        raise ValueError(f"its messages are nested more than {MAX_NESTING} deep")
    if message == "Entry":
        entry = {number: data[a:b] for number, a, b in _fields(data, start, stop)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode("utf-8", "replace")
        return
    inner = _PATHS[message]
    for number, a, b in _fields(data, start, stop):
        if number in inner:
            yield from _locations(data, a, b, inner[number], levels - 1)


def _fields(data: mmap.mmap, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, start, stop) of every field with a length between two positions."""
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
