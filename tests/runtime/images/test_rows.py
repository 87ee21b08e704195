"""Results that are written in rows have the pixels and the metadata of the whole-image functions."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from moesr.runtime.errors import OutputError, UsageError
from moesr.runtime.images import provenance, reading, rows, tiff_library
from moesr.runtime.images.metadata import Metadata, Text
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.tiff_tags import Tag

RNG = np.random.default_rng(12)
RECORD = Provenance(4, "synthetic", {"steps": 2}, "a.png", "0" * 64)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(params=["streamed", "held"])
def packages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the packages of the extra, and as if they were not installed."""
    if request.param == "held":
        monkeypatch.setattr(rows, "_pyvips", lambda: None)
        monkeypatch.setattr(tiff_library, "library", lambda: None)
    else:
        pytest.importorskip("pyvips")
        pytest.importorskip("tifffile")
    return request.param


def save(path: Path, pixels: np.ndarray, carried: Metadata | None = None, **options: int) -> None:
    height, width, channels = pixels.shape
    with rows.Spool(path.parent, height, width, channels, pixels.dtype) as spool:
        for start in range(0, len(pixels), 5):
            spool.pixels[start : start + 5] = pixels[start : start + 5]
        rows.save_spool(path, spool, carried or Metadata(), RECORD, **options)
    assert not list(path.parent.glob(".moesr*"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_spool_is_lossless(tmp_path: Path, packages: str, suffix: str, channels: int, dtype: type):
    pixels = RNG.integers(0, np.iinfo(dtype).max, (23, 31, channels), dtype, endpoint=True)
    save(tmp_path / f"a{suffix}", pixels)
    assert provenance.read(tmp_path / f"a{suffix}") == RECORD
    if dtype == np.uint8 or channels == 1:
        got = reading.load(tmp_path / f"a{suffix}").pixels.reshape(pixels.shape)
    elif packages == "held" or (channels, suffix) == (2, ".tif"):
        return  # reduced to 8 bits with a warning
    elif suffix == ".tif":
        got = pytest.importorskip("tifffile").imread(tmp_path / "a.tif")
    else:
        got = read_deep_png(tmp_path / "a.png")
    np.testing.assert_array_equal(got.reshape(pixels.shape), pixels)


def read_deep_png(path: Path) -> np.ndarray:
    return pytest.importorskip("pyvips").Image.new_from_file(str(path)).numpy()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_jpeg(tmp_path: Path, packages: str, channels: int):
    y, x = np.mgrid[0:40, 0:50]
    pixels = np.stack([4 * x, 5 * y, 2 * (x + y), np.full_like(x, 255)], -1)[..., :channels].astype(np.uint8)
    save(tmp_path / "a.jpg", pixels)
    save(tmp_path / "b.jpg", pixels, quality=20)
    got = reading.load(tmp_path / "a.jpg").pixels.reshape(40, 50, -1)
    assert np.abs(got.astype(int) - pixels[..., : got.shape[2]]).mean() < 2
    assert (tmp_path / "b.jpg").stat().st_size < (tmp_path / "a.jpg").stat().st_size


def everything() -> Metadata:
    block = Image.Exif()
    block[271], block[315] = "Maker", "Anna"
    return Metadata(
        icc=SRGB,
        exif=block.tobytes(),
        dpi=(300.0, 150.0),
        xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
        iptc=b"\x1c\x02\x78\x00\x07caption",
        texts=(Text("parameters", "a cat"),),
        tags={33550: Tag(12, (2.5, 2.5, 0.0)), 34735: Tag(3, (1, 1, 0, 0))},
    )


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_metadata_and_record(tmp_path: Path, packages: str, suffix: str):
    path = tmp_path / f"a{suffix}"
    save(path, RNG.integers(0, 256, (40, 50, 3), np.uint8), everything())
    assert provenance.read(path) == RECORD and provenance.is_whole(path)
    found = reading.load(path).metadata
    assert (found.icc, found.xmp, found.iptc) == (SRGB, everything().xmp, everything().iptc)
    assert found.dpi
    np.testing.assert_allclose(found.dpi, (300, 150), rtol=1e-3)
    tags = Image.open(path).getexif()
    assert (tags[271], tags[315]) == ("Maker", "Anna")
    assert b"a cat" in path.read_bytes()
    assert (set(found.tags) == {33550, 34735}) == (suffix == ".tif")
    assert path.read_bytes().count(b"pHYs") <= 1


def test_color_tags_and_no_invented_resolution(tmp_path: Path, packages: str):
    gamma = (b"gAMA", struct.pack(">I", 100_000))
    save(tmp_path / "a.png", RNG.integers(0, 256, (4, 5, 3), np.uint8), Metadata(color=(gamma,)))
    found = reading.load(tmp_path / "a.png").metadata
    assert replace(found, exif=None) == Metadata(color=(gamma,))


def test_unknown_suffix(tmp_path: Path):
    with pytest.raises(UsageError, match=r"cannot write \.xyz"):
        save(tmp_path / "a.xyz", np.zeros((2, 2, 3), np.uint8))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_memory_does_not_grow_with_the_image(tmp_path: Path, suffix: str):
    pytest.importorskip("pyvips")
    pytest.importorskip("tifffile")
    height, width = 3000, 1000
    path = tmp_path / f"a{suffix}"
    tracemalloc.start()
    with rows.Spool(tmp_path, height, width, 3, np.uint8) as spool:
        for start in range(0, height, 100):
            spool.pixels[start : start + 100] = start // 100
        rows.save_spool(path, spool, Metadata(), RECORD)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < height * width * 3 / 3
    assert (reading.load(path).pixels == (np.arange(height) // 100)[:, None, None]).all()


def test_without_the_packages_a_note_tells_about_large_images(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(rows, "_pyvips", lambda: None)
    monkeypatch.setattr(rows, "NOTED_FROM_BYTES", 100)
    caplog.set_level("INFO", "moesr")
    save(tmp_path / "a.png", np.zeros((20, 20, 3), np.uint8))
    assert "held in memory, 0 MB; pip install moesr[large]" in caplog.text


class FullDisk:
    """A stream to a disk that is full after some bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_disk_that_fills_up_is_one_clean_error(tmp_path: Path, monkeypatch, capfd, suffix: str):
    pytest.importorskip("pyvips")
    full = contextlib.nullcontext(FullDisk(20_000))
    monkeypatch.setattr(rows, "write_atomically", lambda path: full)
    with pytest.raises(OutputError, match=r"a\.(png|jpg): cannot be written: No space left.*free some"):
        save(tmp_path / f"a{suffix}", RNG.integers(0, 256, (400, 400, 3), np.uint8))
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
