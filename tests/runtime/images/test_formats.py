"""Formats that Pillow reads wrongly or not at all, and the messages about those that it cannot read."""

from __future__ import annotations

import io
import struct
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import png_chunk, write_png, write_tiff
from PIL import Image

from moesr.runtime.errors import InputError
from moesr.runtime.images import formats, reading, writing

RNG = np.random.default_rng(6)
DEEP = RNG.integers(0, 65536, (6, 9), np.uint16)


@pytest.mark.parametrize(
    ("order", "big"), [("<", False), (">", False), ("<", True)], ids=["little", "big", "bigtiff"]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_stored_as_zero(tmp_path: Path, order: str, big: bool, dtype: type):
    picture = (DEEP >> (0 if dtype == np.uint16 else 8)).astype(dtype)
    negative = write_tiff(tmp_path / "a.tif", np.iinfo(dtype).max - picture, 0, order, big)
    positive = write_tiff(tmp_path / "b.tif", picture, 1, order, big)
    for path in (negative, positive):
        np.testing.assert_array_equal(reading.load(path).pixels, picture)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_white_stored_as_zero_in_a_compressed_tiff(tmp_path: Path, compression: str):
    Image.fromarray(65535 - DEEP).save(tmp_path / "a.tif", compression=compression, tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0
        np.testing.assert_array_equal(reading.from_pil(image).pixels, DEEP)
    np.testing.assert_array_equal(reading.load(tmp_path / "a.tif").pixels, DEEP)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_transparent_value_of_16_bit_grey(tmp_path: Path, suffix: str):
    values = DEEP.copy()
    values[:2, :3] = 300
    write_png(tmp_path / "a.png", values, 0, [(b"tRNS", struct.pack(">H", 300))])
    loaded = reading.load(tmp_path / "a.png")
    np.testing.assert_array_equal(loaded.pixels[..., 0], values)
    np.testing.assert_array_equal(loaded.pixels[..., 1], np.where(values == 300, 0, 65535))
    writing.save(tmp_path / f"b{suffix}", loaded)
    with Image.open(tmp_path / f"b{suffix}") as result:
        alpha = np.asarray(result.getchannel("A"))
    np.testing.assert_array_equal(alpha, np.where(values == 300, 0, 255))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparent_value_of_grey_with_few_bits(tmp_path: Path, bits: int):
    """The file stores the transparent value with as many bits as its pixels have."""
    transparent = (1 << bits) // 2
    values = np.arange(1 << min(bits, 3)).astype(np.uint8) * (1 << max(bits - 3, 0))
    lines = np.packbits(np.unpackbits(values[:, None], axis=1)[:, 8 - bits :].reshape(-1))
    header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", transparent))]
    chunks += [(b"IDAT", zlib.compress(b"\0" + lines.tobytes())), (b"IEND", b"")]
    data = b"".join(png_chunk(*chunk) for chunk in chunks)
    (tmp_path / "a.png").write_bytes(formats.PNG_SIGNATURE + data)
    pixels = reading.load(tmp_path / "a.png").pixels[0]
    np.testing.assert_array_equal(pixels[:, 0], values * (255 // ((1 << bits) - 1)))
    np.testing.assert_array_equal(pixels[:, 1], np.where(values == transparent, 0, 255))


def test_transparent_value_of_16_bit_color(tmp_path: Path):
    values = RNG.integers(0, 65536, (4, 5, 3), np.uint16)
    values[1, 2] = 0x1234, 0x5678, 0x9ABC
    write_png(tmp_path / "a.png", values, 2, [(b"tRNS", struct.pack(">3H", *values[1, 2]))])
    pixels = reading.load(tmp_path / "a.png").pixels
    np.testing.assert_array_equal(pixels[..., :3], values)
    assert pixels[1, 2, 3] == 0 and (pixels[..., 3] == 65535).sum() == pixels[..., 3].size - 1


def test_white_stored_as_zero_in_12_bits(tmp_path: Path):
    """Two 12-bit values are packed into three bytes."""
    path = write_tiff(tmp_path / "a.tif", np.array([[0x12, 0x3F, 0xFF]], np.uint8), 0)
    data = bytearray(path.read_bytes())
    for place in range(10, 10 + 9 * 12, 12):
        tag = struct.unpack("<H", data[place : place + 2])[0]
        if tag in (256, 258):
            data[place + 8 : place + 12] = struct.pack("<I", 2 if tag == 256 else 12)
    path.write_bytes(data)
    assert reading.load(path).pixels.tolist() == [[0xFFF - 0x123, 0]]


HEADS = {
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf",
    "AVIF, by a compatible brand": b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "HEIC, by a compatible brand": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic",
    "JPEG XL": b"\xff\x0a" + bytes(40),
    "JPEG XL, as boxes": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    "WebP": b"RIFF\x24\0\0\0WEBPVP8 " + bytes(40),
}
CURES = {
    "AVIF": r"pillow>=11\.3",
    "HEIC": "pillow-heif",
    "JPEG XL": "pillow-jxl-plugin",
    "JPEG 2000": "OpenJPEG",
    "WebP": "built with WebP",
}


@pytest.mark.parametrize("kind", HEADS)
def test_format_unsupported_by_this_pillow(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    Image.init()
    for name in ("AVIF", "HEIF", "JXL", "JPEG2000", "WEBP"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    monkeypatch.setattr(formats, "_import", lambda more: None)
    (tmp_path / "a.png").write_bytes(HEADS[kind] + bytes(64))
    name = kind.split(",")[0]
    with pytest.raises(
        InputError, match=rf"a {name} image, which Pillow [\d.]+ cannot read; .*{CURES[name]}"
    ):
        reading.load(tmp_path / "a.png")


def test_installed_plug_in_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])

    def opener(stream, name):
        return Image.new("RGB", (5, 4), (1, 2, 3))

    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: Image.register_open("HEIF", opener, lambda head: True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    formats._import.cache_clear()
    (tmp_path / "a.heic").write_bytes(HEADS["HEIC"] + bytes(64))
    assert reading.load(tmp_path / "a.heic").pixels.shape == (4, 5, 3)
    formats._import.cache_clear()


@pytest.mark.parametrize(("package", "suffix"), [("pillow_heif", ".heic"), ("pillow_jxl", ".jxl")])
def test_heic_and_jpeg_xl(tmp_path: Path, package: str, suffix: str):
    plugin = pytest.importorskip(package)
    if package == "pillow_heif":
        plugin.register_heif_opener()
    picture = Image.fromarray(np.linspace(0, 250, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8))
    picture.save(tmp_path / f"a{suffix}", quality=95)
    pixels = reading.load(tmp_path / f"a{suffix}").pixels
    assert np.abs(pixels.astype(int) - np.asarray(picture)).mean() < 6
    assert suffix in formats.READ_SUFFIXES


def test_avif(tmp_path: Path):
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    Image.new("RGB", (8, 6), (200, 100, 50)).save(tmp_path / "a.avif", quality=90)
    assert reading.load(tmp_path / "a.avif").pixels.shape == (6, 8, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".png", ".tif", ".bmp"])
def test_quality(tmp_path: Path, suffix: str):
    picture = reading.LoadedImage(RNG.integers(0, 256, (64, 64, 3), np.uint8))
    writing.save(tmp_path / f"a{suffix}", picture)
    writing.save(tmp_path / f"b{suffix}", picture, quality=20)
    best, low = ((tmp_path / f"{name}{suffix}").stat().st_size for name in "ab")
    assert (low < best / 2) == (suffix in (".jpg", ".webp"))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"gAMA", b"\0\0"),
        (b"gAMA", bytes(4)),
        (b"cHRM", b"12345"),
        (b"sRGB", b""),
        (b"cICP", b"\1"),
        (b"pHYs", b"123"),
        (b"iTXt", b"xx"),
        (b"tIME", b"1"),
    ],
    ids=lambda value: value.decode() if value[:1].isalpha() else str(len(value)),
)
@pytest.mark.parametrize("checksum", ["right", "wrong"])
def test_damaged_chunks_of_a_png_are_left_out(tmp_path: Path, kind: bytes, data: bytes, checksum: str):
    """Pillow refuses the whole file for some of them; others would be copied into the result."""
    pixels = DEEP.repeat(3).reshape(6, 9, 3)
    content = write_png(tmp_path / "a.png", pixels, 2, [(kind, data)]).read_bytes()
    if checksum == "wrong":
        good = png_chunk(kind, data)
        content = content.replace(good, good[:-1] + bytes([good[-1] ^ 1]))
        (tmp_path / "a.png").write_bytes(content)
    image = reading.load(tmp_path / "a.png")
    np.testing.assert_array_equal(image.pixels, pixels)
    writing.save(tmp_path / "b.png", image)
    np.testing.assert_array_equal(reading.load(tmp_path / "b.png").pixels, pixels)
    assert kind + data not in (tmp_path / "b.png").read_bytes()


AV1 = b"\0\0\0\x20ftypavif" + bytes(80) + b"av1C\x81\x04"
SIZ = b"\xff\x4f\xff\x51" + bytes(38)


@pytest.mark.parametrize(
    ("kind", "head", "info", "bits"),
    [
        ("AVIF", AV1 + b"\x0c", {}, 8),
        ("AVIF", AV1 + b"\x4c", {}, 10),
        ("AVIF", AV1 + b"\x6c", {}, 12),
        ("AVIF", b"", {}, 8),
        ("HEIF", b"", {"bit_depth": 10}, 10),
        ("JPEG2000", b"jP  ihdr" + bytes(10) + b"\x0f", {}, 16),
        ("JPEG2000", SIZ + b"\x0b", {}, 12),
        ("JPEG2000", SIZ, {}, 8),
        ("PNG", AV1 + b"\x6c", {}, 8),
    ],
)
def test_depth_that_pillow_reduces_is_known(kind: str, head: bytes, info: dict, bits: int):
    image: Any = types.SimpleNamespace(format=kind, fp=io.BytesIO(head), info=info)
    assert formats.bits(image) == bits


def test_a_deep_avif_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    vips = pytest.importorskip("pyvips")
    deep = vips.Image.new_from_memory(DEEP.repeat(3).tobytes(), 9, 6, 3, "ushort").copy(
        interpretation="rgb16"
    )
    try:
        deep.write_to_file(str(tmp_path / "a.avif"), bitdepth=12)
    except vips.Error:
        pytest.skip("this libvips writes no AVIF")
    assert reading.load(tmp_path / "a.avif").pixels.dtype == np.uint8
    assert "has 12 bits per channel, and is read with 8" in caplog.text


def with_thumbnail(path: Path, *, raw: bool) -> np.ndarray:
    """Write a TIFF that begins with a thumbnail, and return the pixels of full size.

    With `raw` they lie in a directory of their own, as in the raw files of cameras.
    """
    picture = RNG.integers(0, 256, (16, 24, 3), np.uint8)
    with pytest.importorskip("tifffile").TiffWriter(path) as file:
        file.write(picture[::4, ::4], photometric="rgb", subfiletype=1, subifds=int(raw), metadata=None)
        file.write(picture, photometric="rgb", metadata=None)
    return picture


def test_thumbnail_before_the_image_is_not_taken_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    picture = with_thumbnail(tmp_path / "a.tif", raw=False)
    np.testing.assert_array_equal(reading.load(tmp_path / "a.tif").pixels, picture)
    assert "only page 2, which is no thumbnail, is used" in caplog.text
    with_thumbnail(tmp_path / "raw.tif", raw=True)
    with pytest.raises(InputError, match=r"raw.tif: holds only a thumbnail of 6x4 pixels .*develop it"):
        reading.load(tmp_path / "raw.tif")


def test_bigtiff_keeps_its_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    picture = RNG.integers(0, 256, (6, 9, 3), np.uint8)
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", picture, bigtiff=True, description="a caption", metadata=None)
    image = reading.load(tmp_path / "a.tif")
    assert image.exif and b"a caption" in image.exif and not caplog.text
