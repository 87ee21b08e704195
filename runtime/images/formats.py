"""Formats of image files: those that are read, how a file is recognized, and which packages add more.

Pillow reads most formats itself. AVIF came with Pillow 11.3; HEIC and JPEG XL are read if the package that
adds them to Pillow is installed.
"""

from __future__ import annotations

import functools
import importlib
import struct
import warnings
from dataclasses import dataclass
from typing import BinaryIO

import PIL
from PIL import Image

READ_FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "WEBP", "BMP", "GIF", "PPM", "TGA", "JPEG2000", "AVIF", "ICO")
"""Pillow's names of the formats that Pillow itself reads."""

_SUFFIXES = ".png .apng .jpg .jpeg .jpe .jfif .mpo .tif .tiff .webp .bmp .dib .gif .ico .tga .avif .avifs"
READ_SUFFIXES = frozenset(f"{_SUFFIXES} .ppm .pgm .pbm .pnm .jp2 .j2k .jpx .heic .heif .hif .jxl".split())
"""Suffixes of files that are taken from a directory; a file that is named directly may have any suffix."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_HEAD_BYTES = 1 << 16  # in which the header of an image lies
_JXL_HEADS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")


@dataclass(frozen=True)
class Addition:
    """A format that Pillow may lack. `name` is its usual name, and `formats` are Pillow's names of it."""

    name: str
    formats: tuple[str, ...]
    modules: tuple[str, ...]  # packages that add it when they are imported or registered
    cure: str


_AVIF = Addition("AVIF", ("AVIF",), ("pillow_avif",), "update to pillow>=11.3, or install pillow-avif-plugin")
_HEIC = Addition("HEIC", ("HEIF",), ("pillow_heif",), "install pillow-heif (pip install moesr[formats])")
_JXL = Addition(
    "JPEG XL", ("JXL",), ("pillow_jxl",), "install pillow-jxl-plugin (pip install moesr[formats])"
)
_JP2 = Addition("JPEG 2000", ("JPEG2000",), (), "install a Pillow built with OpenJPEG")
_WEBP = Addition("WebP", ("WEBP",), (), "install a Pillow built with WebP")


def addition(head: bytes) -> Addition | None:
    """Return the format that Pillow may lack and in which a file begins with `head` (32 bytes), or None."""
    if head.startswith(_JXL_HEADS):
        return _JXL
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _WEBP
    if head.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")):
        return _JP2
    if head[4:8] != b"ftyp":
        return None
    # The major brand comes first; "mif1" may precede "avif" in the list of compatible brands.
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, 32, 4))]
    if any(brand in _AVIF_BRANDS for brand in brands):
        return _AVIF
    return _HEIC if any(brand in _HEIF_BRANDS for brand in brands) else None


def readable(head: bytes) -> list[str]:
    """Return Pillow's names of the formats to try for a file that begins with `head`."""
    Image.init()
    more = addition(head)
    if more and not _known(more):
        _import(more)
    names = (*READ_FORMATS, *(more.formats if more else ()))
    return [name for name in names if name in Image.OPEN]


def _known(more: Addition) -> bool:
    return any(name in Image.OPEN for name in more.formats)


@functools.cache
def _import(more: Addition) -> None:
    """Register the format with Pillow if a package for it is installed."""
    for name in more.modules:
        try:
            module = importlib.import_module(name)
        except Exception:  # a package that does not fit this Pillow may raise any error
            continue
        register = getattr(module, "register_heif_opener", None)
        if register:
            register()


def bits(image: Image.Image) -> int:
    """Return the bits per channel in the file of an open AVIF, HEIC or JPEG 2000; 8 for any other format.

    Pillow and its plug-ins decode color of such files to 8 bits.
    """
    if isinstance(image.info.get("bit_depth"), int):  # from pillow-heif
        return image.info["bit_depth"]
    stream = getattr(image, "fp", None)
    if image.format not in ("AVIF", "JPEG2000") or stream is None or getattr(stream, "closed", False):
        return 8
    before = stream.tell()
    stream.seek(0)
    head = stream.read(_HEAD_BYTES)
    stream.seek(before)
    if image.format == "AVIF":
        flags = head.partition(b"av1C")[2][2:3]
        deep, deeper = (flags[0] & 0x40, flags[0] & 0x20) if flags else (0, 0)
        return 8 if not deep else 12 if deeper else 10
    depth = head[42:43] if head.startswith(b"\xff\x4f\xff\x51") else head.partition(b"ihdr")[2][10:11]
    return (depth[0] & 0x7F) + 1 if depth and depth != b"\xff" else 8


def brief(error: Exception) -> str:
    """Return a decoder's error on one line of bounded length, without control characters from the file."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def unidentified(stream: BinaryIO, head: bytes) -> str:
    """Return why Pillow cannot open a file: it is not an image, or its known format is not supported."""
    if head.startswith(PNG_SIGNATURE) and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
        if not width or not height:
            return f"has no pixels ({width}x{height})"
    more = addition(head)
    if more and not _known(more):
        return f"a {more.name} image, which Pillow {PIL.__version__} cannot read; {more.cure}"
    for name in readable(head):
        factory, accept = Image.OPEN[name]
        if accept and accept(head) is True:
            try:
                stream.seek(0)
                with warnings.catch_warnings(action="ignore"):
                    factory(stream, "")
            except Exception as error:
                return f"a {name} that cannot be opened ({brief(error)}); get the file again or convert it"
    known = ", ".join(READ_FORMATS)
    return f"not an image of a known kind (it begins with {head[:8]!r}); expected one of {known}, HEIC, JXL"
