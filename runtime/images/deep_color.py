"""Images of 16 bits with color or alpha, for which Pillow has no modes: decoded through it, and encoded here.

Pillow's decoders of such files keep one byte of each value. A file is therefore decoded twice, once for the
high bytes and once for the low ones. PNG and TIFF files are written here; the chunks and tags of their
metadata come from a tiny file that Pillow writes.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from moesr.runtime.images.png_chunks import PNG_SIGNATURE, Inserting, chunks, packed

Again = Callable[[], AbstractContextManager[Image.Image]]
"""Opens the same image, or the same page, once more."""

MODES = {2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of the same channels in 8 bits, by the number of channels."""

FORMATS = ("PNG", "TIFF")
"""Pillow's names of the formats that can be written."""

_TWICE = ("RGB;16", "RGBA;16", "RGBX;16")
_OTHER_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}  # by the order of the file
_PNG_COLOR_TYPES = {2: 4, 3: 2, 4: 6}
_LEVEL = 6  # of zlib
_BLOCK_BYTES = 1 << 20
_STRIP_BYTES = 1 << 18
_STORAGE_TAGS = frozenset((254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 338, 339))
_LONG = 4  # a type of TIFF tags


def read(image: Image.Image, again: Again) -> np.ndarray | None:
    """Return uint16 [H, W, C] of an image that is not decoded yet, C as in `MODES`.

    None is returned if the image has not 16 bits with color or alpha, or is of a kind that is not known here.
    The pixels are those of the file: not turned, and without a transparent color.
    """
    tiles: list[Any] = list(getattr(image, "tile", None) or ())
    modes = {_mode(tile) for tile in tiles}
    if image.format == "PPM" and tiles and tiles[0][0] in ("ppm", "ppm_plain") and image.mode == "RGB":
        return _ppm(image, tiles[0])
    animated = image.format == "PNG" and getattr(image, "is_animated", False)  # Pillow composes its frames
    if image.format not in FORMATS or not tiles or animated:
        return None
    if modes <= set("RGBA") and tiles[0][0] == "raw" and _bits(image) == 16:
        return _separate(image, tiles)
    if len(modes) != 1:
        return None
    (mode,) = modes
    if mode == "LA;16B":
        return _decoded(image, "RGBA").view(">u2").astype(np.uint16)
    if mode[:-1] not in _TWICE or _is_planar(image):
        return None
    with again() as second:
        values = _decoded(image, mode).astype(np.uint16) << np.uint16(8)
        values |= _decoded(second, mode[:-1] + _OTHER_BYTE[mode[-1]])
    return values[..., :3] if mode.startswith("RGBX") else values


def _mode(tile: Any) -> str:
    args = tile[3]
    return str(args if isinstance(args, str) else args[0])


def _bits(image: Image.Image) -> int:
    """Return the bits per sample of a TIFF, 0 for another format."""
    tags = getattr(image, "tag_v2", None)
    return int(max(tags.get(258, (0,)))) if tags is not None else 0


def _is_planar(image: Image.Image) -> bool:
    """Return whether an image is a TIFF with a plane per channel; libtiff decodes these to 8 bits only."""
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(284) == 2


def _decoded(image: Image.Image, mode: str) -> np.ndarray:
    """Return the bytes that an image gives when its file is unpacked as `mode`: uint8 [H, W, C]."""
    image.tile = [_with_mode(tile, mode) for tile in image.tile]  # type: ignore[attr-defined]
    image.load()
    return np.asarray(image)


def _with_mode(tile: Any, mode: str) -> Any:
    args = mode if isinstance(tile[3], str) else (mode, *tile[3][1:])
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)


def _ppm(image: Image.Image, tile: Any) -> np.ndarray | None:
    """Return the pixels of a PPM of more than 8 bits, binary or plain, scaled to 16 bits."""
    top = int(tile[3][1])
    if top <= 255:
        return None
    stream: Any = image.fp  # type: ignore[attr-defined]
    stream.seek(tile[2])
    count = image.height * image.width * 3
    values = _numbers(stream, count) if tile[0] == "ppm_plain" else _exactly(stream, count, ">u2")
    values = values.reshape(image.height, image.width, 3)
    scaled = np.minimum(values, top).astype(np.uint32) * 65_535 + top // 2
    return (scaled // top).astype(np.uint16)


def _numbers(stream: Any, count: int) -> np.ndarray:
    """Return the decimal numbers of a plain PPM, between which there may be comments."""
    words = re.sub(rb"#[^\r\n]*", b" ", stream.read()).split()
    if len(words) < count:
        raise OSError("the file ends before its last pixel")
    return np.array(words[:count], np.int64)


def _separate(image: Image.Image, tiles: list[Any]) -> np.ndarray:
    """Return the pixels of an uncompressed TIFF with a plane per channel, which Pillow takes for 8 bits."""
    stream: Any = image.fp  # type: ignore[attr-defined]
    kind = ("<" if image.tag_v2.prefix == b"II" else ">") + "u2"  # type: ignore[attr-defined]
    out = np.empty((image.height, image.width, len(image.getbands())), np.uint16)
    for tile in tiles:
        (left, top, right, bottom), offset, args = tile[1], tile[2], tile[3]
        columns = (args[1] // 2) or right - left  # a tile at the right edge is wider than the image
        stream.seek(offset)
        block = _exactly(stream, (bottom - top) * columns, kind).reshape(bottom - top, columns)
        out[top:bottom, left:right, "RGBA".index(args[0])] = block[:, : right - left]
    return out


def _exactly(stream: Any, count: int, kind: str) -> np.ndarray:
    data = stream.read(count * 2)
    if len(data) < count * 2:
        raise OSError("the file ends before its last pixel")
    return np.frombuffer(data, kind)


def with_transparent_color(pixels: np.ndarray, color: Any) -> np.ndarray:
    """Return RGB [H, W, 3] with alpha, 0 where a pixel has the `color` of three 16-bit values."""
    if pixels.shape[2] != 3 or not isinstance(color, tuple):
        return pixels
    alpha = np.where((pixels == np.array(color, np.uint16)).all(axis=2), 0, 0xFFFF).astype(np.uint16)
    return np.concatenate([pixels, alpha[..., None]], axis=2)


def upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Return the pixels [H, W, C] as the value of EXIF's orientation, `turn`, asks for."""
    if turn in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def write_png(
    stream: BinaryIO, pixels: np.ndarray, options: dict[str, Any], color: Sequence[tuple[bytes, bytes]]
) -> None:
    """Write uint16 [H, W, C] as a PNG, with the metadata of Pillow's `options` and the `color` tags."""
    height, width, channels = pixels.shape
    shell = io.BytesIO()
    target: Any = Inserting(shell, b"".join(packed(*chunk) for chunk in color)) if color else shell
    Image.new(MODES[channels], (1, 1)).save(target, "PNG", **options)
    shell.seek(len(PNG_SIGNATURE))
    stream.write(PNG_SIGNATURE)
    for kind, data in chunks(shell):
        if kind == b"IHDR":
            depth = 16, _PNG_COLOR_TYPES[channels], 0, 0, 0
            data = struct.pack(">IIBBBBB", width, height, *depth)
        if kind != b"IDAT":
            stream.write(packed(kind, data))
            continue
        for part in _png_rows(pixels):
            stream.write(packed(b"IDAT", part))


def _png_rows(pixels: np.ndarray) -> Iterator[bytes]:
    """Yield the compressed rows of a PNG, each as the difference to the pixel on the left (filter 1)."""
    coder = zlib.compressobj(_LEVEL)
    height, width, channels = pixels.shape
    side = channels * 2
    for rows in _blocks(height, width * side, _BLOCK_BYTES):
        data = np.ascontiguousarray(pixels[rows], ">u2").view(np.uint8).reshape(-1, width * side)
        filtered = np.empty((len(data), 1 + width * side), np.uint8)
        filtered[:, 0], filtered[:, 1 : 1 + side] = 1, data[:, :side]
        np.subtract(data[:, side:], data[:, :-side], out=filtered[:, 1 + side :])
        if part := coder.compress(filtered.data):
            yield part
    yield coder.flush()


def write_tiff(stream: BinaryIO, pages: Sequence[np.ndarray], options: dict[str, Any]) -> None:
    """Write uint16 [H, W, C] as the pages of a TIFF, all with the metadata of Pillow's `options`.

    Grey with alpha is written as RGBA, since Pillow reads no 16-bit grey with alpha from a TIFF.
    """
    shell = io.BytesIO()
    Image.new("RGB", (1, 1)).save(shell, "TIFF", **options)
    shell.seek(0)
    link = 4  # where the offset of the next directory belongs
    stream.write(b"II*\0" + bytes(4))
    with Image.open(shell, formats=["TIFF"]) as image:
        for pixels in pages:
            if pixels.shape[2] == 2:
                pixels = np.concatenate([pixels[..., :1].repeat(3, axis=2), pixels[..., 1:]], axis=2)
            strips = [zlib.compress(strip, _LEVEL) for strip in _tiff_strips(pixels)]
            directory = _directory(image.tag_v2, pixels, strips)  # type: ignore[attr-defined]
            place = stream.tell() + stream.tell() % 2
            stream.write(bytes(place - stream.tell()) + directory.tobytes(place))
            stream.writelines(strips)
            end = stream.tell()
            stream.seek(link)
            stream.write(struct.pack("<I", place))
            link = place + 2 + 12 * len(directory)
            stream.seek(end)


def _tiff_strips(pixels: np.ndarray) -> Iterator[bytes]:
    """Yield strips of rows, each value as the difference to the pixel on the left (predictor 2)."""
    height, width, channels = pixels.shape
    for rows in _blocks(height, width * channels * 2, _STRIP_BYTES):
        values = pixels[rows].astype("<u2")
        values[:, 1:] -= pixels[rows, :-1]
        yield values.tobytes()


def _directory(
    like: ImageFileDirectory_v2, pixels: np.ndarray, strips: Sequence[bytes]
) -> ImageFileDirectory_v2:
    """Return the directory of a page; offsets of strips count from its end, as Pillow expects them."""
    height, width, channels = pixels.shape
    rows = next(_blocks(height, width * channels * 2, _STRIP_BYTES)).stop
    tags = ImageFileDirectory_v2(b"II*\0\0\0\0\0")
    for tag in like:
        if tag not in _STORAGE_TAGS:
            tags.tagtype[tag] = like.tagtype[tag]
            tags[tag] = like[tag]
    sizes = tuple(map(len, strips))
    for tag, value in ((256, width), (257, height), (278, rows), (279, sizes)):
        tags.tagtype[tag] = _LONG
        tags[tag] = value
    tags.tagtype[273] = _LONG
    tags[273] = tuple(sum(sizes[:i]) for i in range(len(sizes)))
    for tag, value in ((258, (16,) * channels), (259, 8), (262, 2), (277, channels), (284, 1), (317, 2)):
        tags[tag] = value
    if channels == 4:
        tags[338] = 2  # alpha that is not multiplied in
    return tags


def _blocks(height: int, row_bytes: int, block_bytes: int) -> Iterator[slice]:
    """Yield slices of rows of about this many bytes."""
    step = max(block_bytes // row_bytes, 1)
    return (slice(start, min(start + step, height)) for start in range(0, height, step))
