"""Image files and PIL images, in and out: 8-bit and 16-bit grey, alpha, color profile, EXIF, resolution.

What is read is told by the content, never by the file name; what is written by the suffix, and only ever
whole (a temporary file in the same directory, then a rename).
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from moesr.runtime.errors import InputError
from moesr.runtime.images import exif, libtiff
from moesr.runtime.system.files import open_input, reason

READ_FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "WEBP", "BMP", "GIF", "PPM", "TGA", "JPEG2000", "AVIF", "ICO")
_SUFFIXES = ".png .apng .jpg .jpeg .jpe .jfif .mpo .tif .tiff .webp .bmp .dib .gif .ico .tga .avif"
READ_SUFFIXES = frozenset(f"{_SUFFIXES} .ppm .pgm .pbm .pnm .jp2 .j2k".split())
"""File names taken from a directory; a file named directly may have any suffix."""

MAX_INPUT_PX = 150_000_000
"""Images with more pixels are refused before they are decoded."""

log = logging.getLogger("moesr")


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """Upright pixels and what travels along: uint8 or uint16 [H, W], or uint8 [H, W, C] with C of 2 to 4."""

    pixels: np.ndarray
    icc: bytes | None = None
    exif: bytes | None = None  # without orientation
    dpi: tuple[float, float] | None = None


def load(path: Path, stream: BinaryIO | None = None) -> LoadedImage:
    """Read an image file; InputError saying what is wrong with it. Warnings go to the log.

    `stream` is the opened file, if the caller has opened it; `path` is then only its name in messages.
    """
    path = Path(path)
    if stream is not None:
        return _decode(path, stream)
    with open_input(path) as opened:
        return _decode(path, opened)


def _decode(path: Path, stream: BinaryIO) -> LoadedImage:
    try:
        stream.seek(0)
        head = stream.read(32)
        stream.seek(0)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    if not head:
        raise InputError(f"{path}: is empty (0 bytes); get the file again")
    libtiff.silence()
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            warnings.simplefilter("ignore", UserWarning)  # damaged EXIF and the like: the image itself counts
            formats = [name for name in READ_FORMATS if name in Image.OPEN]
            with Image.open(stream, formats=formats) as image:
                return from_pil(image, name=str(path))
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: {_unidentified(stream, head)}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {_too_large(str(error))}") from error
    except Exception as error:  # decoders raise whatever their parsers meet
        raise InputError(f"{path}: {_damaged(error)}") from error


def from_pil(image: Image.Image, name: str = "image") -> LoadedImage:
    """Take the first frame of a PIL image of any mode, turned upright, as an array and its metadata.

    Raises InputError where the image is too large, empty, closed, damaged or has floating-point pixels.
    """
    try:
        return _take(image, name)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever their parsers meet
        closed = getattr(image, "fp", image) is None or "closed" in str(error)
        text = "is closed; open it again, and keep it open until it is done" if closed else _damaged(error)
        raise InputError(f"{name}: {text}") from error


def _take(image: Image.Image, name: str) -> LoadedImage:
    if image.width * image.height > MAX_INPUT_PX:
        raise InputError(f"{name}: {_too_large(f'{image.width}x{image.height} pixels')}")
    if not image.width or not image.height:
        raise InputError(f"{name}: has no pixels ({image.width}x{image.height})")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # an MPO holds views of one photograph
        log.warning("%s: has %d frames or pages; only the first is used", name, getattr(image, "n_frames", 0))
    grey = _grey_and_alpha_16(image)
    if grey or _loses_depth(image):
        what = "grey with alpha" if grey else "color"
        log.warning("%s: 16-bit %s is read with 8 bits a channel; only 16-bit grey is kept", name, what)
    image.load()
    icc, dpi = image.info.get("icc_profile"), image.info.get("dpi")
    block, turn = exif.read(image, name)
    if turn != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("CMYK", "LAB"):
        image, icc = _to_srgb(image, icc, name), None
    if grey and image.mode == "RGBA":
        image = Image.merge("LA", (image.getchannel("R"), image.getchannel("A")))
    return LoadedImage(_pixels(image, name), icc, block, dpi if dpi and all(dpi) else None)


def with_pixels(like: LoadedImage, pixels: np.ndarray) -> LoadedImage:
    """Other pixels with the metadata of `like`; its EXIF block gets their size."""
    height, width = pixels.shape[:2]
    return replace(like, pixels=pixels, exif=exif.resized(like.exif, width, height))


def _too_large(size: str) -> str:
    return f"too large ({size}): at most {MAX_INPUT_PX // 10**6} million pixels are taken; cut it into parts"


def _damaged(error: Exception) -> str:
    return f"truncated or damaged ({error}); get the file again"


def _unidentified(stream: BinaryIO, head: bytes) -> str:
    """Why Pillow does not know a file: not an image, or one of a known kind that it cannot open."""
    if head.startswith(b"\x89PNG\r\n\x1a\n") and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
        if not width or not height:
            return f"has no pixels ({width}x{height})"
    for name in READ_FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory and accept and accept(head) is True:
            try:
                stream.seek(0)
                with warnings.catch_warnings(action="ignore"):
                    factory(stream, "")
            except Exception as error:
                return f"a {name} that cannot be opened ({error}); get the file again, or convert it to PNG"
    known = ", ".join(READ_FORMATS)
    return f"not an image of a known kind (it begins with {head[:8]!r}); expected one of {known}"


def _tile_modes(image: Image.Image) -> list[str]:
    """How the pixels of an image that is not decoded yet lie in its file, in Pillow's words."""
    tile = getattr(image, "tile", None) or []
    return [str(part) for entry in tile for part in np.atleast_1d(np.array(entry[3], dtype=object))]


def _grey_and_alpha_16(image: Image.Image) -> bool:
    """Whether Pillow is about to make RGBA of 16-bit grey with alpha, for which it has no mode."""
    return any(mode.startswith("LA;16") for mode in _tile_modes(image))


def _loses_depth(image: Image.Image) -> bool:
    """Whether Pillow is about to drop the low bytes of 16-bit color: its RGB modes have 8 bits a channel."""
    if image.mode not in ("RGB", "RGBA", "LA", "CMYK"):
        return False
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,))) > 8  # type: ignore[attr-defined]  # BitsPerSample
    return any(";16" in mode for mode in _tile_modes(image))


def _to_srgb(image: Image.Image, icc: bytes | None, name: str) -> Image.Image:
    """CMYK or Lab by the embedded profile; without one by the plain formula, or as CIE Lab of D50."""
    lab = ImageCms.createProfile("LAB") if image.mode == "LAB" else None
    if icc:
        try:
            return _by_profile(image, ImageCms.ImageCmsProfile(io.BytesIO(icc)))
        except (ImageCms.PyCMSError, OSError, ImportError) as error:
            log.warning("%s: its %s profile cannot be used (%s); converted without", name, image.mode, error)
    return _by_profile(image, lab) if lab else image.convert("RGB")


def _by_profile(image: Image.Image, source: Any) -> Image.Image:
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if converted is None:
        raise OSError("no conversion")
    return converted


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    """Uint8 or, for 16-bit grey, uint16 array of any mode but CMYK."""
    mode = image.mode
    if mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise InputError(f"{name}: has 32-bit pixels outside 0..65535; scale it to 16 bits")
        return values.astype(np.uint16)
    if mode == "F":
        raise InputError(f"{name}: has floating-point pixels; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        wanted = "LA" if mode in ("1", "L", "LA", "La") else "RGBA"
    else:
        wanted = "L" if mode in ("1", "L") else "RGB"
    return np.asarray(image if mode == wanted else image.convert(wanted))
