"""Functions that write image files which Pillow cannot write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(
    path: Path,
    pixels: np.ndarray,
    color: int,
    before: Iterable[tuple[bytes, bytes]] = (),
    after: Iterable[tuple[bytes, bytes]] = (),
) -> Path:
    """Write a PNG of uint8 or uint16 [H, W] or [H, W, C] with chunks before and after its pixels.

    `color` is the color type of the header: 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha.
    """
    height, width = pixels.shape[:2]
    depth = 8 * pixels.dtype.itemsize
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(data)), *after, (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    return path


def write_tiff(path: Path, pixels: np.ndarray, photometric: int, order: str = "<", big: bool = False) -> Path:
    """Write an uncompressed grey TIFF or BigTIFF of [H, W] in a byte order, "<" or ">"."""
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    height, width = pixels.shape
    count, entry, head = 9, (20 if big else 12), (16 if big else 8)
    place = head + (8 if big else 2) + count * entry + (8 if big else 4)
    tags = [
        *((256, 4, width), (257, 4, height), (258, 3, 8 * pixels.itemsize), (259, 3, 1)),
        *((262, 3, photometric), (273, 4, place), (277, 3, 1), (278, 4, height), (279, 4, len(data))),
    ]
    field, size = ("Q", 8) if big else ("I", 4)
    entries = b""
    for tag, kind, value in tags:
        number = struct.pack(order + ("H" if kind == 3 else "I"), value)
        entries += struct.pack(order + "HH" + field, tag, kind, 1) + number.ljust(size, b"\0")
    start = struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8)
    directory = struct.pack(order + ("Q" if big else "H"), count) + entries + bytes(size)
    path.write_bytes((b"II" if order == "<" else b"MM") + start + directory + data)
    return path


def jpeg_with(path: Path, *segments: tuple[int, bytes]) -> Path:
    """Insert segments (marker, data) at the start of a JPEG, after its first marker."""
    data = path.read_bytes()
    added = b"".join(struct.pack(">BBH", 0xFF, kind, len(part) + 2) + part for kind, part in segments)
    path.write_bytes(data[:2] + added + data[2:])
    return path


def iptc_resource(records: bytes) -> bytes:
    """Return the content of a JPEG's APP13 segment with IPTC records."""
    block = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(records)) + records + bytes(len(records) % 2)
    return b"Photoshop 3.0\0" + block
