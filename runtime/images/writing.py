"""Writing image files and PIL images: 8 bits, 16-bit grey, alpha, and the metadata that the format can hold.

The suffix decides the format. A file is written completely or not at all: to a temporary file in the same
directory, which is then renamed.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moesr.runtime.errors import OutputError, UsageError
from moesr.runtime.images import deep_color, embedded, encoding, icc, metadata
from moesr.runtime.images.metadata import CAPACITIES, Metadata
from moesr.runtime.images.png_chunks import Inserting, packed
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.reading import LoadedImage
from moesr.runtime.system.files import reason, write_atomically

log = logging.getLogger("moesr")

_GREY = ("L", "LA", "I;16")  # modes of PIL
_METADATA_KEY = "moesr.metadata"  # key in the `info` of PIL images that `to_pil` makes


@dataclass(frozen=True)
class _Format:
    name: str
    alpha: bool
    deep: bool  # can hold 16-bit grey
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
"""The format of a file, by its suffix in lower case."""


def to_pil(pixels: np.ndarray, like: LoadedImage | None = None) -> Image.Image:
    """Make a PIL image (L, LA, RGB, RGBA, I;16) of an array, with the metadata of `like`.

    16-bit pixels with alpha or color are reduced to 8 bits, since PIL has no mode for them.
    """
    image = _picture(pixels)
    if like:
        carried = _resized(like, pixels)
        values = {"icc_profile": carried.icc, "exif": carried.exif, "dpi": carried.dpi, "xmp": carried.xmp}
        image.info.update({key: value for key, value in values.items() if value})
        image.info[_METADATA_KEY] = carried
    return image


def _resized(like: LoadedImage, pixels: np.ndarray) -> Metadata:
    """Return the metadata of `like` for other pixels."""
    before, after = like.pixels.shape[1::-1], pixels.shape[1::-1]
    return metadata.resized(like.metadata, (before[0], before[1]), (after[0], after[1]))


def _picture(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype == np.uint16 and pixels.ndim == 3:
        pixels = np.rint(pixels / np.float32(257.0)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def check_output(path: Path, width: int = 1, height: int = 1) -> _Format:
    """Return the format of a file name; UsageError for an unknown suffix or a size that it cannot hold."""
    kind = WRITE_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}; use {', '.join(WRITE_FORMATS)}"
        )
    if kind.max_side_px and max(width, height) > kind.max_side_px:
        raise UsageError(
            f"{path}: {width}x{height} pixels are more than {kind.name} can hold "
            f"({kind.max_side_px} per side); write PNG or TIFF"
        )
    return kind


@dataclass(frozen=True)
class Following:
    """Further frames or pages of a file, with Pillow's options for an animation."""

    images: Sequence[LoadedImage]
    options: Mapping[str, Any] = field(default_factory=dict)


_Picture = Image.Image | np.ndarray
"""An image as it is encoded: an array if it has 16 bits with color or alpha, for which PIL has no mode."""


def save(
    path: Path,
    image: LoadedImage | Image.Image,
    record: Provenance | None = None,
    quality: int | None = None,
    following: Following | None = None,
) -> None:
    """Write an image in the format of the suffix, with `record` and its metadata; replaces an existing file.

    A warning names the metadata that the format cannot hold. Alpha that the format cannot hold is flattened
    on white, and 16 bits are reduced to 8 if needed, also with a warning. `quality`, 1 to 100, is that of
    JPEG and WebP (95 by default). `following` are further frames of a format that holds several. Raises
    UsageError for the suffix, OutputError if the file cannot be written.
    """
    path = Path(path)
    picture, carried = _parts(image)
    pictures = [picture, *(_parts(other)[0] for other in (following.images if following else ()))]
    kind = check_output(path, *_size(picture))
    if quality is not None and "quality" in kind.options:
        kind = replace(kind, options={**kind.options, "quality": quality})
    if following:
        kind = replace(kind, options={**kind.options, **following.options})
    pictures = _fitting(path, pictures, kind)
    if kind.name != "TIFF":
        pictures = _of_one_mode(pictures)
    grey = pictures[0].shape[2] == 2 if isinstance(pictures[0], np.ndarray) else pictures[0].mode in _GREY
    carried = metadata.fitted(carried, kind.name, str(path), grey=grey)
    if carried.icc and len(carried.icc) > CAPACITIES[kind.name].icc:
        converted = [_with_profile(_reduced(each), carried, kind.name, path) for each in pictures]
        pictures, carried = [each for each, _ in converted], converted[0][1]
    _write(path, pictures, kind, carried, record)


def _parts(image: LoadedImage | Image.Image) -> tuple[_Picture, Metadata]:
    """Return an image without `info`, which Pillow's encoders would read, and its metadata."""
    if isinstance(image, LoadedImage):
        deep = image.pixels.dtype == np.uint16 and image.pixels.ndim == 3
        return image.pixels if deep else _picture(image.pixels), image.metadata
    carried = image.info.get(_METADATA_KEY)
    if not isinstance(carried, Metadata):
        carried, _ = embedded.read(image, "image")
    picture = image.copy()
    picture.info = {}
    return picture, carried


def _size(picture: _Picture) -> tuple[int, int]:
    if isinstance(picture, np.ndarray):
        return picture.shape[1], picture.shape[0]
    return picture.size


def _fitting(path: Path, pictures: Sequence[_Picture], kind: _Format) -> list[_Picture]:
    """Return the images with the depth and the channels that the format can hold; warnings tell of losses."""
    warned: set[str] = set()

    def warn(text: str) -> None:
        if text not in warned:
            warned.add(text)
            log.warning("%s: %s", path, text)

    arrays = [isinstance(picture, np.ndarray) for picture in pictures]
    keeps = all(arrays) and kind.name in deep_color.FORMATS and (kind.name == "TIFF" or len(pictures) == 1)
    fitting = []
    for picture in pictures:
        if isinstance(picture, np.ndarray):
            if keeps:
                fitting.append(picture)
                continue
            warn("16-bit pixels with alpha or color are written with 8 bits per channel")
        picture = _reduced(picture)
        if picture.mode in ("LA", "RGBA") and not kind.alpha:
            warn(f"{kind.name} has no transparency; flattened on white")
            picture = _flatten(picture)
        if picture.mode == "I;16" and not kind.deep:
            warn(f"{kind.name} has no 16-bit grey; reduced to 8 bits")
            picture = _reduced(np.asarray(picture))
        fitting.append(picture)
    return fitting


def _of_one_mode(pictures: list[_Picture]) -> list[_Picture]:
    """Return the images in one mode, since an animation cannot mix modes as the pages of a TIFF can."""
    modes = {each.mode for each in pictures if isinstance(each, Image.Image)}
    if len(modes) <= 1:
        return pictures
    shallow = [
        _reduced(np.asarray(each)) if "I;16" in each.mode else each for each in map(_reduced, pictures)
    ]
    wanted = "RGBA" if any(mode.endswith("A") for mode in modes) else "RGB"
    return [each.convert(wanted) for each in shallow]


def _reduced(picture: _Picture) -> Image.Image:
    """Return an array as a PIL image of 8 bits."""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(np.rint(picture / np.float32(257.0)).astype(np.uint8))
    return picture


def _with_profile(
    picture: Image.Image, carried: Metadata, format_name: str, path: Path
) -> tuple[Image.Image, Metadata]:
    """Return the image converted to sRGB, for a format that cannot hold its color profile."""
    assert carried.icc
    alpha = picture.getchannel("A") if picture.mode in ("LA", "RGBA") else None
    plain = picture.convert(picture.mode[:-1]) if alpha else picture
    converted = icc.to_srgb(plain, carried.icc)
    if converted is None:
        log.warning("%s: %s cannot hold its color profile (%d bytes)", path, format_name, len(carried.icc))
    else:
        log.warning(
            "%s: %s cannot hold its color profile; the pixels are converted to sRGB", path, format_name
        )
        if alpha:
            converted.putalpha(alpha)
    return converted or picture, replace(carried, icc=None, color=() if converted else carried.color)


def _write(
    path: Path, pictures: Sequence[_Picture], kind: _Format, carried: Metadata, record: Provenance | None
) -> None:
    """Write the file; if the encoder fails because of the metadata, write it without them."""
    options, lost = encoding.options(carried, kind.name, record)
    if lost:
        log.warning("%s: %s cannot hold %s; PNG can", path, kind.name, ", ".join(lost))
    try:
        try:
            _encode(path, pictures, kind, options, carried)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            if _is_of_the_system(error) or carried == Metadata():
                raise
            log.warning("%s: its metadata cannot be written and is left out (%s)", path, reason(error))
            plain = replace(Metadata(), icc=carried.icc)
            options, _ = encoding.options(plain, kind.name, record)
            _encode(path, pictures, kind, options, plain)
    except MemoryError:
        raise
    except Exception as error:  # encoders raise errors of many kinds
        cure = "name another place with -o" if _is_of_the_system(error) else "write another format"
        raise OutputError(f"{path}: cannot be written: {reason(error)}; {cure}") from error


def _is_of_the_system(error: Exception) -> bool:
    """Return True if an error came from the file system, not from an encoder."""
    return isinstance(error, UnicodeError) or (isinstance(error, OSError) and error.errno is not None)


def _encode(
    path: Path, pictures: Sequence[_Picture], kind: _Format, options: dict[str, Any], carried: Metadata
) -> None:
    first = pictures[0]
    if isinstance(first, np.ndarray):
        with write_atomically(path) as stream:
            if kind.name == "PNG":
                deep_color.write_png(stream, first, options, carried.color)
            else:
                deep_color.write_tiff(stream, [np.asarray(each) for each in pictures], options)
        return
    content = io.BytesIO() if len(pictures) > 1 else None  # an encoder of pages reads what it wrote
    with write_atomically(path) as stream:
        target: Any = content or stream
        if kind.name == "PNG" and carried.color:
            target = Inserting(target, b"".join(packed(*chunk) for chunk in carried.color))
        more = {"save_all": True, "append_images": list(pictures[1:])} if content else {}
        first.save(target, kind.name, **kind.options, **options, **more)
        if content:
            stream.write(content.getbuffer())


def _flatten(image: Image.Image) -> Image.Image:
    color = "RGB" if image.mode == "RGBA" else "L"
    base = Image.new(color, image.size, "white")
    base.paste(image.convert(color), mask=image.getchannel("A"))
    return base
