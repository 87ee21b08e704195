"""Metadata that encoders refuse, and damaged files: results are written, messages name the true reason."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine
from image_files import jpeg_with, write_png
from PIL import Image, ImageCms

from moesr.runtime.cli.run import main
from moesr.runtime.errors import InputError, OutputError
from moesr.runtime.images import metadata, provenance, reading, writing
from moesr.runtime.images.metadata import Metadata
from moesr.runtime.images.provenance import Provenance

RNG = np.random.default_rng(9)
RGB = RNG.integers(0, 256, (16, 20, 3), np.uint8)
RECORD = Provenance(4, "synthetic", {"steps": 2}, "a.png", "0" * 64)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ALL = [".png", ".jpg", ".webp", ".tif", ".bmp"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=1)


def run(engine: Path, *arguments: object) -> int:
    return main(["--engine", str(engine), "--quiet", *map(str, arguments)])


def with_resolution(path: Path, numerator: int, denominator: int) -> Path:
    """Return a TIFF with this fraction as its resolution."""
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "TIFF", dpi=(72, 72))
    data = bytearray(buffer.getvalue())
    (start,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[start : start + 2])
    for place in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack("<H", data[place : place + 2])[0] in (282, 283):
            (value,) = struct.unpack("<I", data[place + 8 : place + 12])
            data[value : value + 8] = struct.pack("<II", numerator, denominator)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", ALL)
@pytest.mark.parametrize("fraction", [(0, 0), (1, 0), (0, 1), (2**32 - 1, 1), (1, 2**32 - 1)], ids=str)
def test_impossible_resolutions(engine: Path, tmp_path: Path, suffix: str, fraction: tuple[int, int]):
    source = with_resolution(tmp_path / "a.tif", *fraction)
    result = tmp_path / f"b{suffix}"
    assert run(engine, source, "-o", result) == 0
    assert reading.load(result).pixels.shape == (64, 80, 3)
    assert suffix == ".bmp" or provenance.read(result)


@pytest.mark.parametrize("suffix", ALL)
@pytest.mark.parametrize(
    "dpi",
    [
        *((math.nan, 72.0), (math.inf, 72.0), (-72.0, -72.0), (1e300, 1e300), (1e-300, 1e-300), (0.0, 0.0)),
        *(("a", "b"), (72.0,), 72.0, (20_000.0, 20_000.0)),
    ],
    ids=str,
)
def test_impossible_resolutions_of_pil_images(tmp_path: Path, suffix: str, dpi: object):
    image = Image.fromarray(RGB)
    image.info["dpi"] = dpi
    loaded = reading.from_pil(image)
    writing.save(tmp_path / f"a{suffix}", reading.with_pixels(loaded, RGB.repeat(4, 0).repeat(4, 1)), RECORD)
    assert reading.load(tmp_path / f"a{suffix}").pixels.shape == (64, 80, 3)


@pytest.mark.parametrize("suffix", ALL)
def test_impossible_numbers_in_exif(tmp_path: Path, suffix: str):
    """An EXIF block has the rationals 0/0 in the directories of the image and of the exposure."""
    entries = [(282, 5, 1), (283, 5, 1)]
    block = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries) + 1)
    for tag, kind, count in entries:
        block += struct.pack(">HHII", tag, kind, count, 120)
    block += struct.pack(">HHIII", 0x8769, 4, 1, 60, 0)
    block = block.ljust(66, b"\0") + struct.pack(">HHHIII", 1, 33434, 5, 1, 120, 0)
    jpeg_with_exif = tmp_path / "a.jpg"
    Image.fromarray(RGB).save(jpeg_with_exif)
    jpeg_with(jpeg_with_exif, (0xE1, block.ljust(140, b"\0")))
    loaded = reading.load(jpeg_with_exif)
    writing.save(tmp_path / f"b{suffix}", reading.with_pixels(loaded, RGB.repeat(4, 0).repeat(4, 1)), RECORD)
    assert reading.load(tmp_path / f"b{suffix}").pixels.shape == (64, 80, 3)


def large_profile(size: int = 3_000_000) -> bytes:
    return (len(SRGB) + size).to_bytes(4, "big") + SRGB[4:] + RNG.bytes(size)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("suffix", ALL)
def test_large_profiles(engine: Path, tmp_path: Path, suffix: str, mode: str, capsys):
    source = tmp_path / "a.tif"
    Image.fromarray(RGB).convert(mode).save(source, icc_profile=large_profile())
    result = tmp_path / f"b{suffix}"
    assert run(engine, source, "-o", result) == 0
    with Image.open(result) as image:
        image.load()
        kept = image.info.get("icc_profile")
    assert bool(kept) == (suffix not in (".png", ".bmp"))
    assert ("cannot hold its color profile" in capsys.readouterr().err) == (not kept)
    assert run(engine, result, "-o", tmp_path / "again.png") == 0


def test_pixels_are_converted_if_a_profile_is_too_large(tmp_path: Path):
    from moesr.runtime.images import icc

    linear = icc.of_color_tags({b"gAMA": struct.pack(">I", 100_000)}, grey=False)
    assert linear
    data = linear + bytes(2_000_000)
    data = struct.pack(">I", len(data)) + data[4:]
    grey = np.full((4, 4, 3), 128, np.uint8)
    writing.save(tmp_path / "a.png", reading.LoadedImage(grey, Metadata(icc=data)))
    assert np.abs(reading.load(tmp_path / "a.png").pixels.astype(int) - 188).max() <= 1


@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "after the pixels"])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "iCCP"])
def test_png_with_20_mb_of_text_is_not_truncated(tmp_path: Path, kind: str, late: bool, caplog):
    value = b"x" * 20_000_000
    data = {
        "zTXt": b"key\0\0" + zlib.compress(value),
        "iTXt": b"key\0\1\0\0\0" + zlib.compress(value),
        "tEXt": b"key\0" + value,
        "iCCP": b"key\0\0" + zlib.compress(large_profile(20_000_000)),
    }[kind]
    chunks = [(kind.encode(), data)] * (4 if kind == "tEXt" else 1)
    late = late and kind != "iCCP"
    write_png(tmp_path / "a.png", RGB, 2, [] if late else chunks, chunks if late else [])
    loaded = reading.load(tmp_path / "a.png")
    np.testing.assert_array_equal(loaded.pixels, RGB)
    writing.save(tmp_path / "b.png", loaded, RECORD)
    with Image.open(tmp_path / "b.png") as image:
        image.load()
    assert "cannot hold" in caplog.text


@pytest.mark.parametrize("suffix", ALL)
@pytest.mark.parametrize("large", ["exif", "xmp", "iptc", "texts", "comments"])
def test_metadata_that_is_too_large_for_the_target(tmp_path: Path, suffix: str, large: str, caplog):
    block = Image.Exif()
    block[271] = "Maker"
    block[0x8769] = {0x9286: b"u" * 1_200_000}
    values = {
        "exif": block.tobytes(),
        "xmp": b"<x>" + b"x" * 1_200_000 + b"</x>",
        "iptc": b"\x1c\x02\x78" + bytes(1_200_000),
        "texts": (metadata.Text("key", "ü" * 600_000),),
        "comments": (b"c" * 1_200_000,),
    }
    picture = reading.LoadedImage(RGB, Metadata(**{large: values[large]}))
    writing.save(tmp_path / f"a{suffix}", picture, RECORD)
    reread = reading.load(tmp_path / f"a{suffix}")
    assert suffix == ".bmp" or provenance.read(tmp_path / f"a{suffix}") == RECORD
    assert "cannot hold" in caplog.text or len(str(vars(reread.metadata))) > 1_100_000


def test_exif_over_64_kb_to_jpeg(engine: Path, tmp_path: Path, capsys):
    block = Image.Exif()
    block[271] = "Maker"
    block[0x8769] = {0x927C: b"m" * 70_000, 0xA002: 20}
    Image.fromarray(RGB).save(tmp_path / "a.webp", exif=block.tobytes())
    assert run(engine, tmp_path / "a.webp", "-o", tmp_path / "b.jpg") == 0
    assert "JPEG cannot hold all of its EXIF data" in capsys.readouterr().err
    exif = Image.open(tmp_path / "b.jpg").getexif()
    assert (exif[271], exif.get_ifd(0x8769)[0xA002]) == ("Maker", 80)


@pytest.mark.parametrize("suffix", [".tif", ".webp", ".png", ".jpg"])
@pytest.mark.parametrize("software", ["Ver.1.00\0\0\0", "\0\0\0\0", "a\0b", "   \0"], ids=repr)
def test_software_with_padding(engine: Path, tmp_path: Path, suffix: str, software: str, capsys):
    block = Image.Exif()
    block[0x131] = software
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=block)
    result = tmp_path / f"b{suffix}"
    for _ in range(2):
        assert run(engine, tmp_path / "a.jpg", "-o", result) == 0
        assert provenance.read(result)
    if software.startswith("Ver") and suffix in (".tif", ".webp"):
        assert Image.open(result).getexif()[0x131].startswith("Ver.1.00; moesr {")


def test_metadata_refused_by_an_encoder_do_not_fail_the_result(tmp_path: Path, monkeypatch, caplog):
    plain = Image.Image.save

    def save(self, stream, kind, **options):
        if options.get("exif"):
            raise ValueError("no")
        plain(self, stream, kind, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    block = Image.Exif()
    block[271] = "Maker"
    writing.save(tmp_path / "a.png", reading.LoadedImage(RGB, Metadata(exif=block.tobytes())), RECORD)
    assert provenance.read(tmp_path / "a.png") == RECORD
    assert "its metadata cannot be written and is left out (no)" in caplog.text


def test_encoder_errors_are_not_blamed_on_the_file_name(tmp_path: Path, monkeypatch):
    def save(self, stream, kind, **options):
        raise ValueError("too many colors")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OutputError) as caught:
        writing.save(tmp_path / "a.png", reading.LoadedImage(RGB))
    assert "file name" not in str(caught.value) and "another place" not in str(caught.value)
    assert "too many colors" in str(caught.value)


def test_damaged_images_are_not_reported_as_closed(tmp_path: Path):
    seen = 0
    for kind, options in (
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PNG", {}),
        ("JPEG", {}),
        ("GIF", {}),
        ("WEBP", {}),
    ):
        buffer = io.BytesIO()
        Image.fromarray(RGB.repeat(3, 0).repeat(3, 1)).save(buffer, kind, **options)
        for start in range(8, len(buffer.getvalue()) - 400, 97):
            data = bytearray(buffer.getvalue())
            data[start : start + 360] = b"\xff" * 360
            (tmp_path / "a.img").write_bytes(data)
            try:
                reading.load(tmp_path / "a.img")
            except InputError as error:
                seen += 1
                assert "closed" not in str(error)
    assert seen > 20


def test_files_without_package_metadata(monkeypatch: pytest.MonkeyPatch):
    import importlib.metadata

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    provenance._version.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", absent)
    record = Provenance(4, "e", {})
    provenance._version.cache_clear()
    assert record.version == "unknown" and '"moesr": "unknown"' in record.to_json()


def test_metadata_of_the_largest_size_can_be_read_back(tmp_path: Path, caplog):
    """Metadata of the largest size that the table of capacities allows can be read back from the file."""
    for suffix in ALL[:4]:
        kind = writing.check_output(tmp_path / f"a{suffix}").name
        capacity = metadata.CAPACITIES[kind]
        size = {name: min(getattr(capacity, name), 3_000_000) for name in ("icc", "xmp", "iptc", "text")}
        profile = large_profile(size["icc"] - len(SRGB))
        filled = Metadata(
            icc=profile,
            xmp=b"<" + b"x" * (size["xmp"] - 1),
            iptc=(b"\x1c" + bytes(size["iptc"] - 1)) if size["iptc"] else None,
            comments=(b"c" * size["text"],),
        )
        path = tmp_path / f"a{suffix}"
        writing.save(path, reading.LoadedImage(RGB, filled), RECORD)
        found = reading.load(path).metadata
        assert (found.icc, found.xmp, found.iptc) == (profile, filled.xmp, filled.iptc), suffix
        assert provenance.read(path) == RECORD
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_color_tags_are_dropped_by_a_conversion(tmp_path: Path):
    """After pixels are converted from a profile to sRGB, a gamma tag beside them would be wrong."""
    gamma = (b"gAMA", struct.pack(">I", 100_000))
    image = reading.LoadedImage(RGB, Metadata(icc=large_profile(), color=(gamma,)))
    writing.save(tmp_path / "a.png", image)
    assert b"gAMA" not in (tmp_path / "a.png").read_bytes()


def test_large_jpeg_xl_is_refused_before_it_is_decoded(tmp_path: Path):
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed")
    sides = 0b11 << 1 | (2**30 - 1) << 3 | 1 << 33  # SizeHeader: a side of 2^30 pixels, ratio 1
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + sides.to_bytes(8, "little") + bytes(40))
    with pytest.raises(InputError, match="too large \\(1073741824x1073741824"):
        reading.load(tmp_path / "a.jxl")
