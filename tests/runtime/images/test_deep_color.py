"""16 bits with color or alpha are read, worked on and written in 16 bits, from every layout of a file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from engines import build_engine
from image_files import write_png
from PIL import Image, ImageCms

from moesr.runtime import Upscaler
from moesr.runtime.cli.run import main
from moesr.runtime.errors import InputError
from moesr.runtime.images import deep_color, provenance, reading, tiff_library, writing
from moesr.runtime.images.metadata import Metadata, Text
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.reading import LoadedImage

RNG = np.random.default_rng(16)
DEEP = RNG.integers(0, 65536, (37, 41, 4), np.uint16)
RECORD = Provenance(4, "synthetic", {"steps": 2}, "a.png", "0" * 64)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PNG_COLORS = {2: 4, 3: 2, 4: 6}


def write_deep_tiff(path: Path, pixels: np.ndarray, **options: object) -> Path:
    if options.get("planarconfig") == "separate":
        pixels = np.moveaxis(pixels, -1, 0)
    extra = ["unassalpha"] if 4 in (pixels.shape[0], pixels.shape[-1]) else None
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=extra, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_png(tmp_path: Path, channels: int):
    want = DEEP[..., :channels]
    got = reading.load(write_png(tmp_path / "a.png", want, PNG_COLORS[channels])).pixels
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, want)


LAYOUTS = [
    {},
    {"byteorder": ">"},
    {"compression": "deflate"},
    {"compression": "deflate", "byteorder": ">", "predictor": True},
    {"planarconfig": "separate"},
    {"planarconfig": "separate", "byteorder": ">", "tile": (16, 16)},
    {"tile": (16, 32)},
    {"tile": (16, 16), "compression": "deflate"},
    {"rowsperstrip": 5, "bigtiff": True},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("channels", [3, 4])
def test_tiff(tmp_path: Path, options: dict, channels: int):
    want = DEEP[..., :channels]
    got = reading.load(write_deep_tiff(tmp_path / "a.tif", want, **options)).pixels
    np.testing.assert_array_equal(got, want)


def test_compressed_planes_need_tifffile(tmp_path: Path, monkeypatch, caplog):
    options = {"planarconfig": "separate", "compression": "deflate", "metadata": None}
    path = write_deep_tiff(tmp_path / "a.tif", DEEP[..., :3], **options)
    np.testing.assert_array_equal(reading.load(path).pixels, DEEP[..., :3])
    assert not caplog.text
    monkeypatch.setattr(tiff_library, "library", lambda: None)
    np.testing.assert_array_equal(reading.load(path).pixels, DEEP[..., :3] >> 8)
    assert "16-bit color of this kind is read with 8 bits" in caplog.text


def test_layouts_that_pillow_does_not_know(tmp_path: Path):
    """BigTIFF in the other byte order, grey with alpha in 16 bits, and colors multiplied by alpha."""
    path = tmp_path / "a.tif"
    write_deep_tiff(path, DEEP[..., :3], bigtiff=True, byteorder=">")
    np.testing.assert_array_equal(reading.load(path).pixels, DEEP[..., :3])
    options = {"photometric": "minisblack", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(path, DEEP[..., :2], **options)
    np.testing.assert_array_equal(reading.load(path).pixels, DEEP[..., :2])
    alpha = np.maximum(DEEP[..., 3:], 1000)
    multiplied = np.rint(DEEP[..., :3] * (alpha / 65535.0)).astype(np.uint16)
    pixels = np.concatenate([multiplied, alpha], axis=2)
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=["assocalpha"])
    got = reading.load(path).pixels.astype(int)
    assert np.abs(got[..., :3] - DEEP[..., :3]).max() <= 33  # half a level of the product, divided by alpha
    np.testing.assert_array_equal(got[..., 3:], alpha)


@pytest.mark.parametrize("top", [65_535, 1023])
def test_ppm(tmp_path: Path, top: int):
    values = DEEP[..., :3] // (65_536 // (top + 1))
    head = f"P6\n# a comment\n41 37\n{top}\n".encode()
    (tmp_path / "a.ppm").write_bytes(head + values.astype(">u2").tobytes())
    got = reading.load(tmp_path / "a.ppm").pixels
    np.testing.assert_array_equal(got, np.rint(values * (65_535 / top)).astype(np.uint16))


def test_plain_ppm(tmp_path: Path):
    values = DEEP[..., :3] // 64
    text = f"P3 # a comment\n41 37\n1023\n# 1 2 3\n{' '.join(map(str, values.ravel()))}\n"
    (tmp_path / "a.ppm").write_text(text)
    got = reading.load(tmp_path / "a.ppm").pixels
    np.testing.assert_array_equal(got, np.rint(values * (65_535 / 1023)).astype(np.uint16))
    (tmp_path / "b.ppm").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="truncated or damaged"):
        reading.load(tmp_path / "b.ppm")


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation(tmp_path: Path, turn: int):
    """An image of 8 bits is turned by Pillow, and one of 16 bits as that one."""
    shallow = (DEEP[..., :3] >> 8).astype(np.uint8)
    block = Image.Exif()
    block[0x0112] = turn
    chunk = (b"eXIf", block.tobytes().removeprefix(b"Exif\0\0"))
    for name, pixels in (("deep", shallow.astype(np.uint16) * 257), ("shallow", shallow)):
        write_png(tmp_path / f"{name}.png", pixels, 2, [chunk])
    deep, plain = (reading.load(tmp_path / f"{name}.png").pixels for name in ("deep", "shallow"))
    assert deep.dtype == np.uint16 and plain.dtype == np.uint8
    np.testing.assert_array_equal(deep, plain.astype(np.uint16) * 257)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("kind", ["png", "tif", "planar", "ppm"])
def test_damaged_files_are_refused(tmp_path: Path, kind: str, damage: str):
    path = tmp_path / "a.img"
    if kind == "png":
        write_png(path, DEEP[..., :3], 2)
    elif kind == "ppm":
        path.write_bytes(b"P6 41 37 65535\n" + DEEP[..., :3].tobytes())
    else:
        write_deep_tiff(
            path,
            DEEP[..., :3],
            **({"planarconfig": "separate"} if kind == "planar" else {"compression": "deflate"}),
        )
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-2000:]
    elif kind in ("png", "tif"):
        data[len(data) // 2 :][:200] = bytes(200)
        data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    else:
        return  # pixels that are not compressed may have any value
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"truncated or damaged|not an image"):
        reading.load(path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("shape", [(37, 41), (1, 1), (700, 500)], ids=str)
def test_results_keep_16_bits_and_metadata(tmp_path: Path, suffix: str, channels: int, shape, caplog):
    pixels = np.resize(DEEP, (*shape, 4))[..., :channels]
    block = Image.Exif()
    block[0x010F] = "Maker"
    carried = Metadata(
        icc=SRGB, exif=block.tobytes(), dpi=(300.0, 150.0), xmp=b"<x:xmpmeta/>", texts=(Text("Title", "a"),)
    )
    path = tmp_path / f"a{suffix}"
    writing.save(path, LoadedImage(pixels, carried), RECORD)
    got = reading.load(path)
    want = pixels[..., [0, 0, 0, 1]] if (suffix, channels) == (".tif", 2) else pixels
    assert got.pixels.dtype == np.uint16
    np.testing.assert_array_equal(got.pixels, want)
    assert (got.icc, got.metadata.xmp) == (SRGB, b"<x:xmpmeta/>")
    assert got.dpi == pytest.approx((300, 150), rel=1e-3)
    assert provenance.read(path) == RECORD and provenance.is_whole(path)
    with Image.open(path) as image:
        assert image.getexif()[0x010F] == "Maker"
    if suffix == ".png":
        assert got.metadata.texts == carried.texts
    else:
        np.testing.assert_array_equal(tifffile.imread(path), want)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp"])
def test_other_formats_get_8_bits_and_a_warning(tmp_path: Path, suffix: str, caplog):
    writing.save(tmp_path / f"a{suffix}", LoadedImage(np.full((9, 9, 3), 257 * 100, np.uint16)))
    assert np.abs(reading.load(tmp_path / f"a{suffix}").pixels.astype(int) - 100).max() <= 2
    assert "are written with 8 bits per channel" in caplog.text


def test_color_tags_and_large_profiles(tmp_path: Path, caplog):
    gamma = (b"gAMA", struct.pack(">I", 100_000))
    writing.save(tmp_path / "a.png", LoadedImage(DEEP[..., :3], Metadata(color=(gamma,))))
    assert reading.load(tmp_path / "a.png").metadata.color == (gamma,)
    large = struct.pack(">I", len(SRGB) + 3_000_000) + SRGB[4:] + RNG.bytes(3_000_000)
    writing.save(tmp_path / "b.png", LoadedImage(DEEP[..., :3], Metadata(icc=large)))
    assert reading.load(tmp_path / "b.png").pixels.dtype == np.uint8
    assert "converted to sRGB" in caplog.text


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=2)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_whole_run(engine: Path, tmp_path: Path, suffix: str, capsys):
    source = tmp_path / f"a{suffix}"
    small = DEEP[:9, :12, :3]
    (write_png(source, small, 2) if suffix == ".png" else write_deep_tiff(source, small))
    result = tmp_path / f"r{suffix}"
    assert main(["--engine", str(engine), str(source), "-o", str(result)]) == 0
    assert "8 bits" not in capsys.readouterr().err
    with Upscaler(engine) as up:
        np.testing.assert_array_equal(reading.load(result).pixels, up(small))
    assert main(["--engine", str(engine), str(source), "-o", str(result)]) == 0
    assert "skipped" in capsys.readouterr().err


def test_pages(engine: Path, tmp_path: Path, capsys):
    pages = [np.ascontiguousarray(DEEP[i : i + 9, :12, :3]) for i in range(2)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in pages:
            file.write(page, photometric="rgb", metadata=None)
    result = tmp_path / "r.tif"
    command = ["--engine", str(engine), str(tmp_path / "a.tif"), "-o", str(result), "--frames", "all"]
    assert main(command) == 0
    assert "8 bits" not in capsys.readouterr().err
    with Upscaler(engine) as up, tifffile.TiffFile(result) as found:
        assert len(found.pages) == 2
        for number, page in enumerate(pages):
            np.testing.assert_array_equal(found.pages[number].asarray(), up(page))
    assert deep_color.MODES[3] == "RGB" and provenance.read(result)
