"""Image files and PIL images out: 8-bit and 16-bit grey, alpha, color profile, EXIF, resolution.

The suffix decides the format. A file is written whole or not at all: to a temporary file in the same
directory, which is then renamed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moesr.runtime.errors import OutputError, UsageError
from moesr.runtime.images import exif
from moesr.runtime.images.provenance import KEY, Provenance
from moesr.runtime.images.reading import (
    LoadedImage,
)
from moesr.runtime.system.files import reason, write_atomically

log = logging.getLogger("moesr")


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


def to_pil(pixels: np.ndarray, like: LoadedImage | None = None) -> Image.Image:
    """Make a PIL image (L, LA, RGB, RGBA, I;16) of an array, with the metadata of `like`."""
    if pixels.dtype == np.uint16 and pixels.ndim == 3:
        pixels = np.rint(pixels / np.float32(257.0)).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if like:
        metadata = {"icc_profile": like.icc, "exif": exif.resized(like.exif, *image.size), "dpi": like.dpi}
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


def save(path: Path, image: LoadedImage | Image.Image, record: Provenance | None = None) -> None:
    """Write an image as its suffix says, with ICC, EXIF, resolution and `record`; replaces an existing file.

    UsageError for the suffix, OutputError where it cannot be written. Alpha that the format lacks is
    flattened on white and 16-bit grey reduced to 8 bits, both with a warning.
    """
    path = Path(path)
    if isinstance(image, LoadedImage):
        image = to_pil(image.pixels, image)
    kind = check_output(path, *image.size)
    metadata = _metadata(image, kind, record, str(path))
    if image.mode in ("LA", "RGBA") and not kind.alpha:
        log.warning("%s: %s has no transparency; flattened on white", path, kind.name)
        image = _flatten(image)
    if image.mode == "I;16" and not kind.deep:
        log.warning("%s: %s has no 16-bit grey; reduced to 8 bits", path, kind.name)
        image = Image.fromarray(np.rint(np.asarray(image) / np.float32(257.0)).astype(np.uint8))
    try:
        with write_atomically(path) as stream:
            image.save(stream, kind.name, **kind.options, **metadata)
    except MemoryError:
        raise
    except Exception as error:  # encoders raise errors of many kinds
        raise OutputError(
            f"{path}: cannot be written: {reason(error)}; name another place with -o"
        ) from error


def _metadata(image: Image.Image, kind: _Format, record: Provenance | None, name: str) -> dict[str, Any]:
    """What travels with the pixels, as options of Pillow's encoder."""
    metadata = {key: image.info[key] for key in ("icc_profile", "exif", "dpi") if image.info.get(key)}
    if record and kind.name == "PNG":
        metadata["pnginfo"] = PngInfo()
        metadata["pnginfo"].add_text(KEY, record.to_json())
    elif record and kind.name == "JPEG":
        metadata["comment"] = f"{KEY} {record.to_json()}"
    elif record and kind.name in ("TIFF", "WEBP"):
        metadata["exif"] = exif.marked(metadata.get("exif"), record)
    if kind is _TIFF and "exif" in metadata:
        metadata["exif"] = exif.for_tiff(metadata["exif"], name)
    return metadata


def _flatten(image: Image.Image) -> Image.Image:
    color = "RGB" if image.mode == "RGBA" else "L"
    base = Image.new(color, image.size, "white")
    base.paste(image.convert(color), mask=image.getchannel("A"))
    return base
