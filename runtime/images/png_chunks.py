"""Chunks of PNG files: texts and color tags, read without Pillow's limits, and written beside its own.

The format is PNG, third edition (W3C, 2025). Pillow refuses a whole file for a compressed text or profile of
more than 1 MiB, and neither reads nor writes every color tag.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from moesr.runtime.images.formats import PNG_SIGNATURE

COLOR_TAGS = (b"cICP", b"mDCV", b"cLLI", b"sRGB", b"gAMA", b"cHRM")
HEADER_BYTES = len(PNG_SIGNATURE) + 25
"""The size of the signature and the first chunk, IHDR."""

MAX_DECOMPRESSED_BYTES = 64 << 20
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_OF_PIXELS = frozenset((b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"pHYs", b"eXIf", b"acTL"))
_LENGTHS = {b"cICP": 4, b"mDCV": 24, b"cLLI": 8, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"acTL": 8}


@dataclass(frozen=True)
class Text:
    """A text chunk. `language` and `translated` (the keyword in that language) belong to iTXt."""

    key: str
    value: str
    language: str = ""
    translated: str = ""


@dataclass(frozen=True)
class Contents:
    """The metadata chunks of a PNG. `skipped` names chunks that could not be used."""

    texts: tuple[Text, ...]
    color: tuple[tuple[bytes, bytes], ...]  # type and data of the chunks in `COLOR_TAGS`
    icc: bytes | None
    exif: bytes | None
    skipped: tuple[str, ...]


def chunks(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield types and data of the chunks after the signature, up to IEND; ValueError if one is damaged."""
    kind = b""
    while kind != b"IEND":
        head = stream.read(8)
        if len(head) < 8:
            raise ValueError("the file ends before its last chunk")
        length, kind = struct.unpack(">I4s", head)
        data = stream.read(length)
        if stream.read(4) != struct.pack(">I", zlib.crc32(kind + data)):
            raise ValueError(f"the chunk {kind!r} is damaged")
        yield kind, data


def headers(stream: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, length and position of the data of each chunk, without reading it.

    Ends if the file does.
    """
    stream.seek(len(PNG_SIGNATURE))
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        place = stream.tell()
        yield kind, length, place
        if kind == b"IEND":
            return
        stream.seek(place + length + 4)


def contents(stream: BinaryIO) -> Contents:
    """Return texts, color tags and profile of a PNG; the position in the stream is restored."""
    before = stream.tell()
    texts: list[Text] = []
    color: dict[bytes, bytes] = {}
    icc, exif, skipped = None, None, []
    try:
        for kind, length, place in headers(stream):
            if kind not in (*_TEXTS, *COLOR_TAGS, b"iCCP", b"eXIf"):
                continue
            if length > MAX_DECOMPRESSED_BYTES:
                skipped.append(kind.decode())
                continue
            stream.seek(place)
            data = stream.read(length)
            try:
                if not _is_valid(kind, data):
                    skipped.append(kind.decode())
                elif kind in COLOR_TAGS:
                    color.setdefault(kind, data)
                elif kind == b"eXIf":
                    exif = data
                elif kind == b"iCCP":
                    icc = _inflated(data.partition(b"\0")[2][1:])
                else:
                    texts.append(_text(kind, data))
            except (ValueError, zlib.error):
                skipped.append(kind.decode())
            stream.seek(place + length + 4)
    finally:
        stream.seek(before)
    return Contents(tuple(texts), tuple(color.items()), icc, exif, tuple(skipped))


def _text(kind: bytes, data: bytes) -> Text:
    """Return the content of a text chunk; ValueError or zlib.error if it is damaged or too large."""
    key, _, rest = data.partition(b"\0")
    name = key.decode("latin-1").strip()
    if kind == b"tEXt":
        return Text(name, rest.decode("latin-1"))
    if kind == b"zTXt":
        return Text(name, _inflated(rest[1:]).decode("latin-1"))
    language, translated, value = rest[2:].split(b"\0", 2)
    value = _inflated(value) if rest[:1] == b"\1" else value
    return Text(name, value.decode("utf-8"), language.decode("latin-1"), translated.decode("utf-8"))


def _inflated(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    value = inflater.decompress(data, MAX_DECOMPRESSED_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError("too large")
    return value


def _is_valid(kind: bytes, data: bytes) -> bool:
    """Return True unless a chunk has the wrong length, or a gamma of 0."""
    return len(data) == _LENGTHS.get(kind, len(data)) and not (kind == b"gAMA" and data == bytes(4))


def stripped(stream: BinaryIO) -> io.BytesIO:
    """Return a copy of a PNG in memory with only the chunks for its pixels, its size and its EXIF block.

    Those of its pixels are copied as they are, the others only if they are undamaged.
    """
    copy = io.BytesIO()
    copy.write(PNG_SIGNATURE)
    for kind, length, place in headers(stream):
        if kind not in _OF_PIXELS:
            continue
        stream.seek(place - 8)
        chunk = stream.read(length + 12)
        data = chunk[8:-4]
        if kind.isupper() or (packed(kind, data) == chunk and _is_valid(kind, data)):
            copy.write(chunk)
    copy.seek(0)
    return copy


class Inserting:
    """A stream that inserts bytes after the first `at` bytes written to it.

    `skip` bytes that follow there are dropped.
    """

    def __init__(self, stream: BinaryIO, inserted: bytes, at: int = HEADER_BYTES, skip: int = 0) -> None:
        self._stream, self._inserted, self._at, self._skip = stream, inserted, at, skip
        self._head: bytearray | None = bytearray()

    def write(self, data: bytes) -> int:
        """Pass `data` on, and insert the bytes when their position has been reached."""
        if self._head is None:
            self._stream.write(data)
            return len(data)
        self._head += data
        if len(self._head) >= self._at + self._skip:
            head, self._head = bytes(self._head), None
            self._stream.write(head[: self._at] + self._inserted + head[self._at + self._skip :])
        return len(data)

    def flush(self) -> None:
        """Flush the underlying stream."""
        self._stream.flush()


def packed(kind: bytes, data: bytes) -> bytes:
    """Return a chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
