"""Hostile image files, each with the exit code and the message that `moesr-run` must give for it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms


@dataclass(frozen=True)
class Attack:
    """A file or other entry that `make` creates, with the expected exit code and a pattern of the message.

    With exit code 0 the image is upscaled into each of `results`, and `says` is not used.
    """

    make: Callable[[Path], object]
    code: int
    says: str
    name: str = "in.png"
    results: tuple[str, ...] = ("out.png",)


def picture(mode: str = "RGB", size: tuple[int, int] = (13, 9)) -> Image.Image:
    """Return an image of seeded noise."""
    noise = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode)


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    """Return the bytes of an image file."""
    stream = io.BytesIO()
    (image or picture()).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 13, height: int = 9, depth: int = 8, color: int = 2) -> bytes:
    """Return a PNG with these chunks between IHDR and IDAT; its pixels are those of `picture`."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    rows = np.asarray(picture())
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b""))
    )


def tiff_with(tag: int, kind: int, count: int, value: bytes, data: bytes = b"", **options: object) -> bytes:
    """Return a TIFF in which one directory entry is replaced (the last one, if it lacks the tag)."""
    content = bytearray(encoded("TIFF", **options))
    start = struct.unpack("<I", content[4:8])[0]
    entries = struct.unpack("<H", content[start : start + 2])[0]
    places = [start + 2 + 12 * k for k in range(entries)]
    place = next((p for p in places if struct.unpack("<H", content[p : p + 2])[0] == tag), places[-1])
    pointer = struct.pack("<I", len(content)) if data else value.ljust(4, b"\0")
    content[place : place + 12] = struct.pack("<HHI", tag, kind, count) + pointer
    return bytes(content + data)


def damaged_strip() -> bytes:
    """Return a TIFF whose LZW data are damaged in the middle."""
    content = bytearray(encoded("TIFF", picture(size=(64, 48)), compression="tiff_lzw"))
    content[40:400] = b"\xff" * 360
    return bytes(content)


def looping_tiff() -> bytes:
    """Return a TIFF whose directory names itself as the next directory."""
    content = bytearray(encoded("TIFF"))
    start = struct.unpack("<I", content[4:8])[0]
    entries = struct.unpack("<H", content[start : start + 2])[0]
    content[start + 2 + 12 * entries :][:4] = struct.pack("<I", start)
    end = start + 2 + 12 * entries
    return bytes(content[:end] + struct.pack("<I", start) + content[end + 4 :])


def jpeg_size(width: int, height: int) -> bytes:
    """Return a small JPEG whose header declares another size."""
    content = bytearray(encoded("JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def bmp_size(width: int, height: int) -> bytes:
    """Return a small BMP whose header declares another size."""
    content = bytearray(encoded("BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def large_profile(extra: int = 3_000_000) -> bytes:
    """Return a valid ICC profile followed by zeros."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return (len(icc) + extra).to_bytes(4, "big") + icc[4:] + bytes(extra)


def software(text: str) -> Image.Exif:
    """Return EXIF data with a Software tag."""
    exif = Image.Exif()
    exif[0x131] = text
    return exif


def maker_note(nbytes: int) -> Image.Exif:
    """Return EXIF data with a long MakerNote."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x927C] = b"m" * nbytes
    return exif


def file(content: Callable[[], bytes] | bytes) -> Callable[[Path], object]:
    """Return a function that writes a file with this content."""
    return lambda path: path.write_bytes(content() if callable(content) else content)


DAMAGED = "(truncated or damaged|cannot be opened).*get the file again"
UNKNOWN = "not an image of a known kind"
LARGE = "too large .*; cut it into parts"

REFUSED = {
    "empty": Attack(file(b""), 1, r"is empty \(0 bytes\); get the file again"),
    "one_byte": Attack(file(b"\x89"), 1, UNKNOWN),
    "text": Attack(file(b"hello\n"), 1, UNKNOWN, "in.jpg"),
    "svg": Attack(file(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), 1, UNKNOWN),
    "zip": Attack(file(b"PK\x03\x04" + bytes(60)), 1, UNKNOWN),
    "program": Attack(file(b"\x7fELF" + bytes(60)), 1, UNKNOWN),
    "signature_alone": Attack(file(b"\x89PNG\r\n\x1a\n"), 1, DAMAGED),
    "no_width": Attack(file(png(width=0)), 1, r"has no pixels \(0x9\)"),
    "no_height": Attack(file(png(height=0)), 1, r"has no pixels \(13x0\)"),
    "declared_4_gigapixels": Attack(file(png(width=65535, height=65535)), 1, LARGE),
    "declared_max": Attack(file(png(width=2**31 - 1, height=2**31 - 1)), 1, LARGE),
    "png_truncated": Attack(file(lambda: png()[:-40]), 1, DAMAGED),
    "png_checksum": Attack(file(lambda: png().replace(b"IDAT", b"IDAX")), 1, DAMAGED),
    "png_wrong_depth": Attack(file(lambda: png(depth=3)), 1, f"{DAMAGED}|{UNKNOWN}"),
    "jpeg_truncated": Attack(file(lambda: encoded("JPEG")[:-60]), 1, DAMAGED, "in.jpg"),
    "jpeg_declared_large": Attack(file(lambda: jpeg_size(65000, 65000)), 1, LARGE, "in.jpg"),
    "jpeg_no_height": Attack(
        file(lambda: jpeg_size(13, 0)), 1, f"has no pixels|{DAMAGED}|{UNKNOWN}", "in.jpg"
    ),
    "webp_truncated": Attack(file(lambda: encoded("WEBP")[:-50]), 1, DAMAGED, "in.webp"),
    "tiff_damaged_strip": Attack(file(damaged_strip), 1, DAMAGED, "in.tif"),
    "tiff_huge_width": Attack(
        file(lambda: tiff_with(256, 4, 1, struct.pack("<I", 2**31))), 1, f"{LARGE}|{DAMAGED}", "in.tif"
    ),
    "tiff_float": Attack(
        file(lambda: encoded("TIFF", Image.new("F", (9, 9)))), 1, "1 band of float32", "in.tif"
    ),
    "tiff_32_bits": Attack(
        file(lambda: encoded("TIFF", Image.new("I", (9, 9), 70_000))), 1, "1 band of int32", "in.tif"
    ),
    "tiff_header_alone": Attack(file(b"II*\0\x08\0\0\0"), 1, f"{DAMAGED}|{UNKNOWN}", "in.tif"),
    "bmp_huge_height": Attack(file(lambda: bmp_size(13, 2**31 - 1)), 1, f"{LARGE}|{DAMAGED}", "in.bmp"),
    "bmp_negative_width": Attack(
        file(lambda: bmp_size(-13, 9)), 1, f"has no pixels|{LARGE}|{DAMAGED}|{UNKNOWN}", "in.bmp"
    ),
    "jpeg_xl_start": Attack(file(b"\xff\n\xd8\xff" + bytes(100)), 1, DAMAGED + "|JPEG XL", "in.jxl"),
    "gif_truncated": Attack(file(lambda: encoded("GIF")[:30]), 1, f"{DAMAGED}|{UNKNOWN}", "in.gif"),
    "ppm_declared_large": Attack(file(b"P6 99999 99999 255\n" + bytes(99)), 1, LARGE, "in.ppm"),
    "ppm_digits": Attack(file(b"P6 " + b"9" * 5000 + b" 1 255\n"), 1, f"{DAMAGED}|{UNKNOWN}", "in.ppm"),
    "fifo": Attack(os.mkfifo, 1, "is a (named )?pipe"),
    "directory_named_png": Attack(lambda path: path.mkdir(), 2, "no images in"),
    "link_to_itself": Attack(lambda path: path.symlink_to(path), 1, "in.png"),
    "device": Attack(lambda path: path.symlink_to("/dev/zero"), 1, "is a (character )?device"),
}

ACCEPTED = {
    "png_text_bomb": Attack(
        file(lambda: png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(70_000_000))))), 0, ""
    ),
    "png_huge_density": Attack(
        file(lambda: png(chunk(b"pHYs", struct.pack(">IIB", 2**32 - 1, 1, 1)))), 0, ""
    ),
    "png_zero_density": Attack(file(lambda: png(chunk(b"pHYs", bytes(8) + b"\1"))), 0, ""),
    "png_garbage_exif": Attack(file(lambda: png(chunk(b"eXIf", b"MM\0*" + bytes(8)))), 0, ""),
    "png_large_profile": Attack(
        file(lambda: png(chunk(b"iCCP", b"p\0\0" + zlib.compress(large_profile())))), 0, ""
    ),
    "jpeg_large_profile": Attack(file(lambda: encoded("JPEG", icc_profile=large_profile())), 0, "", "in.jpg"),
    "jpeg_padded_software": Attack(
        file(lambda: encoded("JPEG", exif=software("Ver.1.00\0\0\0"))),
        0,
        "",
        "in.jpg",
        ("out.tif", "out.webp"),
    ),
    "webp_long_exif": Attack(
        file(lambda: encoded("WEBP", exif=maker_note(70_000))), 0, "", "in.webp", ("out.jpg",)
    ),
    "tiff_resolution_0_0": Attack(
        file(lambda: tiff_with(282, 5, 1, b"", struct.pack("<II", 0, 0), dpi=(72, 72))),
        0,
        "",
        "in.tif",
        ("out.png", "out.tif"),
    ),
    "tiff_resolution_infinite": Attack(
        file(lambda: tiff_with(283, 5, 1, b"", struct.pack("<II", 1, 0), dpi=(72, 72))),
        0,
        "",
        "in.tif",
        ("out.png", "out.tif"),
    ),
    "tiff_resolution_negative": Attack(
        file(lambda: tiff_with(282, 10, 1, b"", struct.pack("<ii", -5, 1), dpi=(72, 72))),
        0,
        "",
        "in.tif",
        ("out.png", "out.tif"),
    ),
    "tiff_looping": Attack(file(looping_tiff), 0, "", "in.tif"),
    "wrong_suffix": Attack(file(lambda: encoded("JPEG")), 0, "", "in.png"),
    "escape_in_name": Attack(file(png), 0, "", "a\x1b[2Jb.png"),
    "newline_in_name": Attack(file(png), 0, "", "a\nb.png"),
    "bytes_in_name": Attack(file(png), 0, "", os.fsdecode(b"a\xff\xfe.png")),
}
