"""Image files and PIL images, in and out: 8-bit and 16-bit grey, alpha, colour profile, EXIF, resolution.

What is read is told by the content, never by the file name; what is written by the suffix, and only ever
whole (a temporary file in the same directory, then a rename).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from moesr.runtime import exif
from moesr.runtime.errors import InputError, OutputError, UsageError

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


@dataclass(frozen=True)
class _Format:
    name: str
    alpha: bool
    deep: bool  # takes 16-bit grey
    max_side_px: int | None
    options: dict[str, Any]


_JPEG = _Format("JPEG", False, False, 65_500, {"quality": 95, "subsampling": 0})
_TIFF = _Format("TIFF", True, True, None, {"compression": "tiff_adobe_deflate"})
WRITE_FORMATS = {
    ".png": _Format("PNG", True, True, None, {}),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _Format("WEBP", True, False, 16_383, {"quality": 95}),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": _Format("BMP", False, False, None, {}),
}
"""How to write a file, by suffix in lower case."""


def load(path: Path) -> LoadedImage:
    """Read an image file; InputError saying what is wrong with it. Warnings go to the log."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory, expected an image file")
    try:
        with path.open("rb") as stream:
            head = stream.read(32)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not head:
        raise InputError(f"{path}: is empty (0 bytes); get the file again")
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            warnings.simplefilter("ignore", UserWarning)  # damaged EXIF and the like: the image itself counts
            formats = [name for name in READ_FORMATS if name in Image.OPEN]
            with Image.open(path, formats=formats) as image:
                return from_pil(image, name=str(path))
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: not an image of a known kind (it begins with {head[:8]!r}); "
            f"expected one of {', '.join(READ_FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {_too_large(str(error))}") from error
    except Exception as error:  # decoders raise whatever their parsers meet
        raise InputError(f"{path}: truncated or damaged ({error}); get the file again") from error


def from_pil(image: Image.Image, name: str = "image") -> LoadedImage:
    """Take the first frame of a PIL image of any mode, turned upright, as an array and its metadata.

    Raises InputError where the image is too large, empty or has floating-point pixels. A damaged file raises
    what Pillow does: `load` translates that.
    """
    if image.width * image.height > MAX_INPUT_PX:
        raise InputError(f"{name}: {_too_large(f'{image.width}x{image.height} pixels')}")
    if not image.width or not image.height:
        raise InputError(f"{name}: has no pixels ({image.width}x{image.height})")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # an MPO holds views of one photograph
        log.warning("%s: has %d frames or pages; only the first is used", name, getattr(image, "n_frames", 0))
    if _loses_depth(image):
        log.warning("%s: 16-bit colour is read with 8 bits a channel; only 16-bit grey is kept", name)
    image.load()
    icc, dpi = image.info.get("icc_profile"), image.info.get("dpi")
    block, turn = exif.read(image, name)
    if turn != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "CMYK":
        image, icc = _cmyk_to_rgb(image, icc, name), None
    return LoadedImage(_pixels(image, name), icc, block, dpi if dpi and all(dpi) else None)


def like(loaded: LoadedImage, pixels: np.ndarray) -> LoadedImage:
    """Other pixels, of another size, with what travels along with an image."""
    height, width = pixels.shape[:2]
    return LoadedImage(pixels, loaded.icc, exif.resized(loaded.exif, width, height), loaded.dpi)


def to_pil(loaded: LoadedImage) -> Image.Image:
    """Make a PIL image (L, LA, RGB, RGBA, I;16) with its metadata."""
    pixels = loaded.pixels
    if pixels.dtype == np.uint16 and pixels.ndim == 3:
        pixels = np.rint(pixels / np.float32(257.0)).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    metadata = {"icc_profile": loaded.icc, "exif": loaded.exif, "dpi": loaded.dpi}
    image.info.update({key: value for key, value in metadata.items() if value})
    return image


def check_output(path: Path, width: int = 1, height: int = 1) -> _Format:
    """The format that a file name asks for; UsageError for an unknown suffix or a size it cannot hold."""
    kind = WRITE_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}; use {', '.join(WRITE_FORMATS)}"
        )
    if kind.max_side_px and max(width, height) > kind.max_side_px:
        raise UsageError(
            f"{path}: {width}x{height} pixels are more than {kind.name} can hold "
            f"({kind.max_side_px} a side); write PNG or TIFF"
        )
    return kind


def save(path: Path, image: Image.Image) -> None:
    """Write a PIL image as its suffix says, with its ICC, EXIF and resolution; replaces an existing file.

    UsageError for the suffix, OutputError where it cannot be written. Alpha that the format lacks is
    flattened on white and 16-bit grey reduced to 8 bits, both with a warning.
    """
    path = Path(path)
    kind = check_output(path, *image.size)
    metadata = {key: image.info[key] for key in ("icc_profile", "exif", "dpi") if image.info.get(key)}
    if kind is _TIFF and "exif" in metadata:
        metadata["exif"] = exif.for_tiff(metadata["exif"], str(path))
    if image.mode in ("LA", "RGBA") and not kind.alpha:
        log.warning("%s: %s has no transparency; flattened on white", path, kind.name)
        image = _flatten(image)
    if image.mode == "I;16" and not kind.deep:
        log.warning("%s: %s has no 16-bit grey; reduced to 8 bits", path, kind.name)
        image = Image.fromarray(np.rint(np.asarray(image) / np.float32(257.0)).astype(np.uint8))
    temporary = path.with_name(f".moesr-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            image.save(stream, kind.name, **kind.options, **metadata)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, MemoryError) or not isinstance(error, Exception):
            raise
        reason = getattr(error, "strerror", None) or error  # encoders raise errors of many kinds
        raise OutputError(f"{path}: cannot be written ({reason}); name another place with -o") from error


def _too_large(size: str) -> str:
    return f"too large ({size}): at most {MAX_INPUT_PX // 10**6} million pixels are taken; cut it into parts"


def _loses_depth(image: Image.Image) -> bool:
    """Whether Pillow is about to drop the low bytes of 16-bit colour: its RGB modes have 8 bits a channel."""
    if image.mode not in ("RGB", "RGBA", "LA", "CMYK"):
        return False
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,))) > 8  # type: ignore[attr-defined]  # BitsPerSample
    tile = getattr(image, "tile", None) or []
    arguments = [str(part) for entry in tile for part in np.atleast_1d(np.array(entry[3], dtype=object))]
    return any(";16" in part for part in arguments)


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None, name: str) -> Image.Image:
    """To sRGB by the embedded profile, or by the plain formula where there is none."""
    if not icc:
        return image.convert("RGB")
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ImportError) as error:
        log.warning("%s: its CMYK profile cannot be used (%s); converted without it", name, error)
        converted = None
    return converted or image.convert("RGB")


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


def _flatten(image: Image.Image) -> Image.Image:
    colour = "RGB" if image.mode == "RGBA" else "L"
    base = Image.new(colour, image.size, "white")
    base.paste(image.convert(colour), mask=image.getchannel("A"))
    return base
