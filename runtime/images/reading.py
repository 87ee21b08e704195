"""Reading image files and PIL images of any bit depth and color model of Pillow, turned upright.

The content of a file decides how it is read, never its name. Metadata are read as well (see `metadata.py`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from moesr.runtime.errors import InputError
from moesr.runtime.images import (
    deep_color,
    embedded,
    formats,
    libtiff,
    metadata,
    png_chunks,
    tiff_library,
    tiff_tags,
)
from moesr.runtime.images.deep_color import Again
from moesr.runtime.images.formats import READ_FORMATS, READ_SUFFIXES
from moesr.runtime.images.jxl_header import jxl_size
from moesr.runtime.images.metadata import Metadata
from moesr.runtime.system.files import open_input, reason

__all__ = [
    "MAX_INPUT_PX",
    "READ_FORMATS",
    "READ_SUFFIXES",
    "LoadedImage",
    "from_frame",
    "from_pil",
    "load",
    "with_pixels",
]

MAX_INPUT_PX = 150_000_000
"""Images with more pixels are refused before they are decoded."""

_OR_LARGE = " (moesr-run takes a TIFF of such values with pip install moesr[large])"
_SUBFILE_TYPE, _SUB_DIRECTORIES = 254, 330  # tags of a TIFF
_PAGES_SEARCHED = 8

log = logging.getLogger("moesr")


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """Upright pixels and their metadata.

    `pixels` are uint8 or uint16, [H, W] or [H, W, C] with C of 2 to 4. A result has the `warnings` that
    were logged while it was made, and names the files of its `unfinished` state, which `written` removes.
    """

    pixels: np.ndarray
    metadata: Metadata = field(default_factory=Metadata)
    warnings: tuple[str, ...] = ()
    unfinished: tuple[Path, ...] = ()

    def written(self) -> None:
        """Remove saved steps, which nothing needs once the result has been written."""
        for path in self.unfinished:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    @property
    def icc(self) -> bytes | None:
        """The color profile."""
        return self.metadata.icc

    @property
    def exif(self) -> bytes | None:
        """The EXIF block, without the orientation."""
        return self.metadata.exif

    @property
    def dpi(self) -> tuple[float, float] | None:
        """The resolution in pixels per inch, across and down."""
        return self.metadata.dpi


def load(path: Path, stream: BinaryIO | None = None) -> LoadedImage:
    """Read an image file; raises an InputError that says what is wrong with it. Warnings go to the log.

    `stream` is the opened file, if the caller has opened it; `path` is then only its name in messages.
    """
    path = Path(path)
    if stream is not None:
        return _load(path, stream)
    with open_input(path) as opened:
        return _load(path, opened)


def _load(path: Path, stream: BinaryIO) -> LoadedImage:
    head = b""
    try:
        stream.seek(0)
        head = stream.read(32)
        if not head:
            raise InputError(f"{path}: is empty (0 bytes); get the file again")
        return _decoded(stream, head, path)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        found = _by_library(stream, str(path)) if head.startswith(tiff_library.SIGNATURES) else None
        if found is None:
            raise InputError(f"{path}: {formats.unidentified(stream, head)}") from error
        return found
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {_too_large(str(error))}") from error
    except OSError as error:
        text = f"cannot be read: {reason(error)}" if error.errno else _damaged(error)
        raise InputError(f"{path}: {text}") from error
    except Exception as error:  # decoders raise errors of any kind
        raise InputError(f"{path}: {_damaged(error)}") from error


def _decoded(stream: BinaryIO, head: bytes, path: Path) -> LoadedImage:
    libtiff.silence()
    known = formats.readable(head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is `MAX_INPUT_PX`
        warnings.simplefilter("ignore", UserWarning)  # about damaged metadata
        inverted = tiff_tags.inverted_photometric(stream) if "TIFF" in known else None
        try:
            with _opened(inverted or stream, known) as image:
                again = partial(_opened, inverted or stream, known)
                return _take(image, str(path), inverted=inverted is not None, again=again)
        except (ValueError, OSError, SyntaxError) as error:
            if not head.startswith(formats.PNG_SIGNATURE):
                raise
            found = _without_metadata(stream, path)
            if found is None:
                raise
            if not _is_about_size(error):
                log.warning("%s: some of its chunks are damaged; the pixels are whole", path)
            return found


def _by_library(stream: BinaryIO, name: str) -> LoadedImage | None:
    """Read a TIFF that Pillow does not know through tifffile; None if that is not possible either."""
    pixels = tiff_library.picture(stream, name, MAX_INPUT_PX)
    if pixels is None:
        return None
    return LoadedImage(pixels, tiff_library.metadata_of(tiff_library.page_of(stream, name), name))


def _is_about_size(error: Exception) -> bool:
    """Return True if Pillow refuses a PNG for the size of its texts or profile."""
    return "MAX_TEXT" in str(error) or "too large" in str(error).lower()


def _without_metadata(stream: BinaryIO, path: Path) -> LoadedImage | None:
    """Read a PNG that Pillow refuses, without most of its metadata; None if its pixels are damaged.

    Pillow refuses a file for a long text or profile, or for a damaged chunk. Metadata are read separately.
    """
    short = png_chunks.stripped(stream)
    try:
        with _opened(short, ["PNG"]) as image:
            return _take(image, str(path), source=stream, again=partial(_opened, short, ["PNG"]))
    except (ValueError, OSError, SyntaxError):
        return None


@contextlib.contextmanager
def _opened(stream: BinaryIO, known: list[str]) -> Iterator[Image.Image]:
    size = jxl_size(stream) if "JXL" in known else None  # the plugin decodes an image when it opens it
    if size and size[0] * size[1] > MAX_INPUT_PX:
        raise Image.DecompressionBombError(f"{size[0]}x{size[1]} pixels")
    stream.seek(0)
    with Image.open(stream, formats=known) as image:
        if image.format == "TIFF":
            _to_full_page(image)
        yield image


def _to_full_page(image: Image.Image) -> None:
    """Move from the thumbnail with which a TIFF begins to the first page of full size.

    InputError if there is none, as in the raw files of cameras, whose pixels lie in other directories.
    """
    for number in range(_PAGES_SEARCHED):
        try:
            image.seek(number)
        except EOFError:
            break
        if not _is_thumbnail(image):
            return
    image.seek(0)
    if _SUB_DIRECTORIES in image.tag_v2:  # type: ignore[attr-defined]
        raise InputError(
            f"holds only a thumbnail of {image.width}x{image.height} pixels beside its raw data; develop it, "
            "and use the TIFF or JPEG that comes of it"
        )


def _is_thumbnail(image: Image.Image) -> bool:
    """Return True if a page of a TIFF is declared to be a reduced version of another."""
    kind = image.tag_v2.get(_SUBFILE_TYPE, 0)  # type: ignore[attr-defined]
    return isinstance(kind, int) and bool(kind & 1)


def from_pil(image: Image.Image, name: str = "image") -> LoadedImage:
    """Take the first frame of a PIL image of any mode, turned upright, as an array and its metadata.

    Raises InputError if the image is too large, empty, closed, damaged or has floating-point pixels.
    """
    closed = _is_closed(image)
    try:
        return _take(image, name)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of any kind
        text = "is closed; open it again, and keep it open until it is done" if closed else _damaged(error)
        raise InputError(f"{name}: {text}") from error


def _is_closed(image: Image.Image) -> bool:
    """Return True if pixels of an image have not been read yet and its file is closed."""
    if not isinstance(image, ImageFile.ImageFile):
        return False
    stream = getattr(image, "fp", None)
    return bool(image.tile) and (stream is None or bool(getattr(stream, "closed", False)))


def from_frame(
    image: Image.Image, name: str, again: Again, about: tuple[Metadata, int] | None = None
) -> LoadedImage:
    """Take the present frame or page of an open file, as `load` does for a file of one.

    `again` opens the same frame once more. `about` is the metadata and the orientation if they have been
    read. Raises whatever Pillow's decoders raise, and InputError as `from_pil`.
    """
    return _take(image, name, again=again, about=about, several=True)


def _take(
    image: Image.Image,
    name: str,
    *,
    source: BinaryIO | None = None,
    inverted: bool = False,
    again: Again | None = None,
    about: tuple[Metadata, int] | None = None,
    several: bool = False,
) -> LoadedImage:
    """Convert an image that is not decoded yet.

    `source` is the file if `image` is opened from a part of it; `inverted` says that white is stored as zero.
    `again`, which opens the image once more, is needed for 16 bits with color or alpha. `about` is the
    metadata and the orientation if they are known; `several` says that other frames are used too.
    """
    _check_size(image, name)
    animated = getattr(image, "is_animated", False) and image.format != "MPO"  # an MPO holds several views
    if animated and not several:
        which = f"page {image.tell() + 1}, which is no thumbnail," if image.tell() else "the first"
        log.warning("%s: has %d frames or pages; only %s is used", name, _count(image), which)
    inverted = inverted or _stores_white_as_zero(image)
    carried, turn = about or embedded.read(image, name, source)
    color = image.info.get("transparency")
    deep = deep_color.read(image, again) if again else None
    if deep is not None:
        deep = deep_color.with_transparent_color(deep, color)
        return LoadedImage(deep_color.upright(deep, turn), carried)
    if again and image.format == "TIFF" and _loses_depth(image):
        deep = tiff_library.picture(image.fp, name, MAX_INPUT_PX, image.tell())  # type: ignore[attr-defined]
        if deep is not None:
            return LoadedImage(deep, carried)
    return _of_8_bits_or_grey(image, name, carried, turn, inverted)


def _count(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 0))


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_INPUT_PX:
        raise InputError(f"{name}: {_too_large(f'{image.width}x{image.height} pixels')}")
    if not image.width or not image.height:
        raise InputError(f"{name}: has no pixels ({image.width}x{image.height})")


def _of_8_bits_or_grey(
    image: Image.Image, name: str, carried: Metadata, turn: int, inverted: bool
) -> LoadedImage:
    """Decode an image in one of Pillow's modes: 8 bits, or 16 bits of grey."""
    grey = _grey_and_alpha_16(image)
    if grey or _loses_depth(image):
        what = "grey with alpha" if grey else "color"
        log.warning("%s: 16-bit %s of this kind is read with 8 bits per channel", name, what)
    elif (depth := formats.bits(image)) > 8 and not image.mode.startswith("I"):
        log.warning("%s: has %d bits per channel, and is read with 8", name, depth)
    transparent = _transparent_value(image)
    top = (1 << _bits(image)) - 1 if inverted else 0
    image.load()
    if transparent != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = transparent
    if turn != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("CMYK", "LAB"):
        image = _to_srgb(image, carried.icc, name)
        carried = replace(carried, icc=None, color=())
    if grey and image.mode == "RGBA":
        image = Image.merge("LA", (image.getchannel("R"), image.getchannel("A")))
    pixels = _pixels(image, name)
    if inverted:
        pixels = pixels.dtype.type(top) - pixels
    return LoadedImage(pixels, carried)


def _stores_white_as_zero(image: Image.Image) -> bool:
    """Return True for a TIFF of more than 8 bits that stores white as zero, which Pillow overlooks."""
    return image.mode.startswith("I") and image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]


def with_pixels(like: LoadedImage, pixels: np.ndarray) -> LoadedImage:
    """Return other pixels with the metadata of `like`, which is adapted to the change of size."""
    height, width = like.pixels.shape[:2]
    after = pixels.shape[1], pixels.shape[0]
    return replace(like, pixels=pixels, metadata=metadata.resized(like.metadata, (width, height), after))


def _too_large(size: str) -> str:
    return f"too large ({size}): at most {MAX_INPUT_PX // 10**6} million pixels are taken; cut it into parts"


def _damaged(error: Exception) -> str:
    return f"truncated or damaged ({formats.brief(error)}); get the file again"


def _tile_modes(image: Image.Image) -> list[str]:
    """Return Pillow's names for the layout of the pixels in the file of an image that is not decoded yet."""
    tile = getattr(image, "tile", None) or []
    return [str(part) for entry in tile for part in np.atleast_1d(np.array(entry[3], dtype=object))]


def _grey_and_alpha_16(image: Image.Image) -> bool:
    """Return True if Pillow would convert 16-bit grey with alpha, for which it has no mode, to RGBA."""
    return any(mode.startswith("LA;16") for mode in _tile_modes(image))


def _loses_depth(image: Image.Image) -> bool:
    """Return True if Pillow would drop the low bytes of 16-bit color, as its RGB modes have 8 bits."""
    if image.mode not in ("RGB", "RGBA", "LA", "CMYK"):
        return False
    if image.format == "TIFF":
        return _bits(image) > 8
    return any(";16" in mode for mode in _tile_modes(image))


def _bits(image: Image.Image) -> int:
    """Return the bits of each sample of a TIFF."""
    return int(max(image.tag_v2.get(258, (8,))))  # type: ignore[attr-defined]


def _transparent_value(image: Image.Image) -> Any:
    """Return the grey value or color that a PNG declares transparent, in the depth of Pillow's pixels.

    The file stores it in the depth of its samples, and Pillow does not convert it.
    """
    value, modes = image.info.get("transparency"), _tile_modes(image)
    if image.format != "PNG":
        return value
    if isinstance(value, int) and image.mode == "L":
        return value * next((factor for mode, factor in (("L;2", 85), ("L;4", 17)) if mode in modes), 1)
    if isinstance(value, tuple) and any(";16" in mode for mode in modes):
        return tuple(part >> 8 for part in value)
    return value


def _to_srgb(image: Image.Image, icc: bytes | None, name: str) -> Image.Image:
    """Convert CMYK or Lab with the embedded profile.

    Without one, with the plain formula or as CIE Lab of D50.
    """
    lab = ImageCms.createProfile("LAB") if image.mode == "LAB" else None
    if icc:
        try:
            return _by_profile(image, ImageCms.ImageCmsProfile(io.BytesIO(icc)))
        except (ImageCms.PyCMSError, OSError, ImportError) as error:
            log.warning(
                "%s: its %s profile cannot be used (%s); converted without",
                name,
                image.mode,
                formats.brief(error),
            )
    return _by_profile(image, lab) if lab else image.convert("RGB")


def _by_profile(image: Image.Image, source: Any) -> Image.Image:
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if converted is None:
        raise OSError("no conversion")
    return converted


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    """Return the pixels of an image of any mode but CMYK and Lab: uint8, or uint16 for 16-bit grey."""
    mode = image.mode
    if mode.startswith("I;16"):
        return _with_transparent_value(np.asarray(image).astype(np.uint16), image.info.get("transparency"))
    if mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise InputError(f"{name}: has 32-bit pixels outside 0..65535; scale it to 16 bits{_OR_LARGE}")
        return _with_transparent_value(values.astype(np.uint16), image.info.get("transparency"))
    if mode == "F":
        raise InputError(f"{name}: has floating-point pixels; convert it to 8 or 16 bits{_OR_LARGE}")
    if image.has_transparency_data:
        wanted = "LA" if mode in ("1", "L", "LA", "La") else "RGBA"
    else:
        wanted = "L" if mode in ("1", "L") else "RGB"
    return np.asarray(image if mode == wanted else image.convert(wanted))


def _with_transparent_value(values: np.ndarray, transparent: Any) -> np.ndarray:
    """Return 16-bit grey [H, W], or [H, W, 2] with alpha if one of the values is declared transparent."""
    if not isinstance(transparent, int):
        return values
    alpha = np.where(values == transparent, 0, 0xFFFF).astype(np.uint16)
    return np.stack([values, alpha], axis=2)
