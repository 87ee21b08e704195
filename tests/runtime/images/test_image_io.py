"""Image files of all common kinds are read and written back."""

from __future__ import annotations

import logging
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from moesr.runtime.errors import InputError, OutputError, UsageError
from moesr.runtime.images import reading, writing
from moesr.runtime.images.metadata import Metadata

RNG = np.random.default_rng(7)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(mode: str, size: tuple[int, int] = (9, 6)) -> Image.Image:
    """Return random pixels of a mode; `size` is (width, height)."""
    width, height = size
    if mode == "I;16":
        return Image.fromarray(RNG.integers(0, 65536, (height, width), np.uint16))
    rgba = Image.fromarray(RNG.integers(0, 256, (height, width, 4), np.uint8))
    return rgba.convert("RGB").convert(mode) if mode in ("P", "CMYK", "YCbCr", "1") else rgba.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "shape", "dtype"),
    [
        ("L", ".png", (6, 9), np.uint8),
        ("1", ".png", (6, 9), np.uint8),
        ("I;16", ".png", (6, 9), np.uint16),
        ("I;16", ".tif", (6, 9), np.uint16),
        ("LA", ".png", (6, 9, 2), np.uint8),
        ("RGB", ".bmp", (6, 9, 3), np.uint8),
        ("RGBA", ".png", (6, 9, 4), np.uint8),
        ("RGBA", ".webp", (6, 9, 4), np.uint8),
        ("P", ".gif", (6, 9, 3), np.uint8),
        ("CMYK", ".jpg", (6, 9, 3), np.uint8),
        ("CMYK", ".tif", (6, 9, 3), np.uint8),
    ],
)
def test_modes(tmp_path: Path, mode: str, suffix: str, shape: tuple[int, ...], dtype: type):
    path = tmp_path / f"image{suffix}"
    image = picture(mode)
    image.save(path)
    pixels = reading.load(path).pixels
    assert (pixels.shape, pixels.dtype) == (shape, dtype)
    if suffix in (".png", ".bmp", ".tif") and mode in ("L", "I;16", "LA", "RGB", "RGBA"):
        np.testing.assert_array_equal(pixels, np.asarray(image))


def test_palette_keeps_its_transparency(tmp_path: Path):
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    pixels = reading.load(tmp_path / "a.png").pixels
    assert pixels.shape == (2, 4, 4)
    assert pixels[0, 1, 3] == 0
    assert pixels[0, 0].tolist() == [255, 0, 0, 255]


@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000)], ids=["1x1", "5000x3", "3x5000"])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]):
    picture("RGB", size).save(tmp_path / "a.png")
    assert reading.load(tmp_path / "a.png").pixels.shape == (size[1], size[0], 3)


def test_content_decides_rather_than_the_file_name(tmp_path: Path):
    path = tmp_path / "really_a.jpg"
    picture("RGB").save(path, "PNG")
    assert reading.load(path).pixels.shape == (6, 9, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".gif"])
def test_truncated(tmp_path: Path, suffix: str):
    path = tmp_path / f"cut{suffix}"
    picture("RGB", (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"truncated or damaged|not an image"):
        reading.load(path)


def test_unusable_files(tmp_path: Path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is no image")
    for name, message in {
        "empty.png": "is empty",
        "text.png": "not an image",
        "absent.png": "no such file",
    }.items():
        with pytest.raises(InputError, match=message):
            reading.load(tmp_path / name)
    with pytest.raises(InputError, match="is a directory"):
        reading.load(tmp_path)


def test_decompression_bomb_is_refused_before_decoding(tmp_path: Path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (13_000, 100_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b""))
            + chunk(b"IEND", b"")
        )
        (tmp_path / "bomb.png").write_bytes(data)
        with pytest.raises(InputError, match="too large"):
            reading.load(tmp_path / "bomb.png")


def test_orientation_is_applied_and_reset(tmp_path: Path):
    image = picture("RGB")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"  # rotation by 90 degrees clockwise; the camera's maker
    image.save(tmp_path / "a.png", exif=exif)
    loaded = reading.load(tmp_path / "a.png")
    np.testing.assert_array_equal(loaded.pixels, np.rot90(np.asarray(image), -1))
    writing.save(tmp_path / "b.png", writing.to_pil(loaded.pixels, loaded))
    kept = Image.open(tmp_path / "b.png").getexif()
    assert (kept.get(0x0112), kept[0x010F]) == (None, "Maker")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_profile_and_exif_survive(tmp_path: Path, suffix: str):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0xA002] = 9  # pixel width
    picture("RGB").save(tmp_path / f"a{suffix}", exif=exif, icc_profile=SRGB)
    loaded = reading.load(tmp_path / f"a{suffix}")
    larger = np.repeat(np.repeat(loaded.pixels, 4, 0), 4, 1)
    writing.save(tmp_path / f"b{suffix}", writing.to_pil(larger, loaded))
    result = Image.open(tmp_path / f"b{suffix}")
    assert result.size == (36, 24)
    assert result.info["icc_profile"] == SRGB
    assert result.getexif()[0x010F] == "Maker"
    if suffix != ".tif":  # Pillow writes no sub-directories into a TIFF
        assert result.getexif().get_ifd(0x8769)[0xA002] == 36


def test_tiff_storage_tags_are_not_copied(tmp_path: Path):
    picture("RGB").save(tmp_path / "a.tif", compression="tiff_lzw", dpi=(300, 300))
    loaded = reading.load(tmp_path / "a.tif")
    assert loaded.dpi == (300, 300)
    writing.save(tmp_path / "b.tif", writing.to_pil(np.repeat(loaded.pixels, 2, axis=0), loaded))
    assert Image.open(tmp_path / "b.tif").size == (9, 12)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.tif"))[::2], loaded.pixels)


def test_damaged_exif_does_not_fail_the_image(tmp_path: Path):
    picture("RGB").save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert reading.load(tmp_path / "a.jpg").pixels.shape == (6, 9, 3)


def test_first_frame_of_an_animation_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING, "moesr"):
        pixels = reading.load(tmp_path / "a.gif").pixels
    assert pixels[0, 0, :3].tolist() == [255, 0, 0]
    assert "3 frames or pages; only the first" in caplog.text


def _png(path: Path, width: int, height: int, color: int, row: bytes, depth: int = 16) -> None:
    """Return a PNG of equal rows, without filters; `color` as in its header: 2 RGB, 4 grey with alpha."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("profile", ["none", "lab", "foreign"])
def test_lab_becomes_srgb_without_a_profile(tmp_path: Path, profile: str, caplog: pytest.LogCaptureFixture):
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), (200, 60, 30)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    blocks = {"lab": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), "foreign": SRGB}
    lab.save(tmp_path / "a.tif", **({"icc_profile": blocks[profile]} if profile in blocks else {}))
    loaded = reading.load(tmp_path / "a.tif")
    assert loaded.icc is None
    np.testing.assert_allclose(loaded.pixels[0, 0], (200, 60, 30), atol=4)
    assert ("LAB profile cannot be used" in caplog.text) == (profile == "foreign")


def test_files_of_known_kinds_that_cannot_be_opened(tmp_path: Path):
    _png(tmp_path / "none.png", 0, 5, 2, b"", depth=8)
    with pytest.raises(InputError, match=r"has no pixels \(0x5\)"):
        reading.load(tmp_path / "none.png")
    picture("RGB").save(tmp_path / "a.tif")
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[:40])
    with pytest.raises(InputError, match="a TIFF that cannot be opened"):
        reading.load(tmp_path / "cut.tif")


def test_entries_that_are_not_files_are_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for name, message in {
            "pipe.png": "is a pipe, expected a file; read it as - from standard input",
            "s": "is a socket",
            "link.png": "is a link to a file that does not exist",
            "n" * 256: "File name too long; shorten it",
            "a\0b": "not a possible file name",
        }.items():
            with pytest.raises(InputError, match=message):
                reading.load(tmp_path / name)
    with pytest.raises(InputError, match="is a device"):
        reading.load(Path("/dev/zero"))


def test_damaged_tiffs_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        path = tmp_path / f"{compression}.tif"
        picture("RGB", (64, 64)).save(path, compression=compression)
        data = bytearray(path.read_bytes())
        data[len(data) // 3 : len(data) // 3 + 300] = bytes(range(250, 200, -1)) * 6
        path.write_bytes(data)
        try:
            reading.load(path)
        except InputError as error:
            assert "damaged" in str(error)
    assert capfd.readouterr() == ("", "")


def test_pil_images_that_cannot_be_decoded(tmp_path: Path):
    picture("RGB", (64, 64)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as closed:
        pass
    with pytest.raises(InputError, match="is closed; open it again"):
        reading.from_pil(closed)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with pytest.raises(InputError, match="truncated or damaged"):
        reading.from_pil(Image.open(tmp_path / "cut.png"))


def test_replacing_pixels_keeps_the_metadata():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA002] = 9
    carried = Metadata(SRGB, exif.tobytes(), (300.0, 300.0))
    loaded = reading.LoadedImage(np.zeros((6, 9), np.uint8), carried)
    larger = reading.with_pixels(loaded, np.zeros((24, 36), np.uint16))
    block = Image.Exif()
    block.load(larger.exif or b"")
    assert (larger.pixels.shape, larger.icc, larger.dpi) == ((24, 36), SRGB, (1200.0, 1200.0))
    assert block.get_ifd(0x8769)[0xA002] == 36


def test_pixel_types_that_are_not_supported():
    with pytest.raises(InputError, match="floating-point"):
        reading.from_pil(Image.new("F", (2, 2)))
    with pytest.raises(InputError, match="32-bit pixels"):
        reading.from_pil(Image.new("I", (2, 2), 70_000))
    assert reading.from_pil(Image.new("I", (2, 2), 40_000)).pixels.dtype == np.uint16


def test_save_flattens_and_reduces_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "moesr"):
        writing.save(tmp_path / "a.jpg", Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
        writing.save(tmp_path / "b.jpg", Image.fromarray(np.full((2, 2), 65535, np.uint16)))
    assert np.asarray(Image.open(tmp_path / "a.jpg")).min() == 255
    assert np.asarray(Image.open(tmp_path / "b.jpg")).min() == 255
    assert "flattened on white" in caplog.text
    assert "reduced to 8 bits" in caplog.text


def test_save_refusals(tmp_path: Path):
    with pytest.raises(UsageError, match=r"cannot write \.xyz; use \.png"):
        writing.save(tmp_path / "a.xyz", picture("L"))
    with pytest.raises(UsageError, match="more than WEBP can hold"):
        writing.check_output(tmp_path / "a.webp", 20_000, 10)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        writing.save(tmp_path / "file" / "a.png", picture("L"))


def test_saved_file_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "a.png"
    target.write_bytes(b"earlier")

    def fail(self: Image.Image, stream, *args, **kwargs):
        stream.write(b"half of an image")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OutputError, match="No space left"):
        writing.save(target, picture("L"))
    assert target.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [target]
