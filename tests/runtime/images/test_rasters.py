"""TIFF files of measurements: what is one, its way to the model's colors and back, and a whole run."""

from __future__ import annotations

import logging
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine

from moesr.runtime.cli.run import main
from moesr.runtime.errors import InputError, OutputError
from moesr.runtime.images import provenance, rasters, reading, tiff_library

tifffile = pytest.importorskip("tifffile")
RNG = np.random.default_rng(33)
Y, X = np.mgrid[0:18, 0:22]
SURFACE = (np.sin(X / 5) * 300 + Y * 10 - 100).astype(np.float32)  # such as heights, from -400 to 370
NO_DATA = (42113, 2, 0, "-9999", True)
GROUND = [(33550, 12, 3, (10.0, 10.0, 0.0), True), (33922, 12, 6, (0.0, 0.0, 0.0, 5.0, 6.0, 0.0), True)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=1)


def write(path: Path, values: np.ndarray, **options: object) -> Path:
    options = {"photometric": "minisblack", "metadata": None, **options}
    tifffile.imwrite(path, values, **options)  # type: ignore[arg-type]
    return path


def read(path: Path) -> rasters.Raster | None:
    with path.open("rb") as stream:
        return rasters.read(stream, str(path))


def run(engine: Path, *arguments: object) -> int:
    return main(["--engine", str(engine), "--quiet", *map(str, arguments)])


BANDS = np.stack([SURFACE, 2 * SURFACE, SURFACE**2 / 100, -SURFACE, SURFACE / 1000])


@pytest.mark.parametrize(
    ("values", "options", "groups"),
    [
        (SURFACE, {}, 1),
        (SURFACE.astype(np.float64), {"byteorder": ">"}, 1),
        (SURFACE.astype(np.int16), {}, 1),
        ((SURFACE + 500).astype(np.uint32), {"compression": "zlib"}, 1),
        (BANDS, {"planarconfig": "separate"}, 2),
        (np.moveaxis(BANDS, 0, -1).astype(np.float16), {"planarconfig": "contig"}, 2),
        (RNG.integers(0, 65536, (7, 18, 22), np.uint16), {"planarconfig": "separate"}, 3),
        (RNG.integers(0, 256, (18, 22, 4), np.uint8), {"planarconfig": "contig"}, 2),
        (np.full((18, 22), 7.5, np.float32), {}, 1),
    ],
    ids=["float", "double", "int16", "uint32", "planes", "half", "uint16", "uint8", "constant"],
)
def test_values_return_in_their_type(tmp_path: Path, values: np.ndarray, options: dict, groups: int):
    """Without a model between them, all levels but the rounding to 16 bits come back."""
    raster = read(write(tmp_path / "a.tif", values, **options))
    assert raster is not None and raster.count == groups
    images = [image.pixels for image in raster.images()]
    assert all(image.dtype in (np.uint8, np.uint16) and image.shape[:2] == (18, 22) for image in images)
    got = raster.joined(images)
    want = values if values.ndim == 3 and values.shape[1:] == (18, 22) else np.moveaxis(values, -1, 0)
    want = values[None] if values.ndim == 2 else want
    assert got.dtype == values.dtype.newbyteorder("=")
    step = (want.max(axis=(1, 2)) - want.min(axis=(1, 2))).astype(float) / 65535
    rounding = 0.5 if values.dtype.kind in "iu" else 1e-3 * np.abs(want).max()  # of half precision
    error = np.abs(got.astype(float) - want.astype(float)).max(axis=(1, 2))
    assert (error <= step + (rounding if values.dtype != np.float32 else 1e-4)).all()


def test_missing_values_stay_missing_and_do_not_spread(tmp_path: Path):
    values = SURFACE.copy()
    values[3:6, 4:9] = np.nan
    values[0, 0] = np.inf
    raster = read(write(tmp_path / "a.tif", values))
    assert raster is not None
    (image,) = raster.images()
    gap, around = image.pixels[3:6, 4:9], image.pixels[1:8, 2:11]
    known = around[np.isfinite(values[1:8, 2:11])]
    assert known.min() <= gap.min() and gap.max() <= known.max()
    twice = image.pixels.repeat(2, axis=0).repeat(2, axis=1)
    (got,) = raster.joined([twice])
    np.testing.assert_array_equal(np.isnan(got), ~np.isfinite(values).repeat(2, axis=0).repeat(2, axis=1))
    values[np.isnan(values)] = -9999
    declared = read(write(tmp_path / "b.tif", values, extratags=[NO_DATA]))
    assert declared and declared.ranges and declared.ranges[0][0] > -500
    assert (declared.joined([i.pixels for i in declared.images()])[0, 3:6, 4:9] == -9999).all()


def test_colors_keep_one_range(tmp_path: Path):
    """Floating-point colors from 0 to 1 are taken as they are, and other RGB bands are stretched alike."""
    colors = RNG.random((18, 22, 3)).astype(np.float32) * [0.9, 0.5, 0.2]
    raster = read(write(tmp_path / "a.tif", colors.astype(np.float32), photometric="rgb"))
    assert raster and raster.ranges == ((0.0, 1.0),) * 3
    wide = read(write(tmp_path / "b.tif", (colors * 900).astype(np.float32), photometric="rgb"))
    assert wide and wide.ranges and len(set(wide.ranges)) == 1 and wide.ranges[0][1] > 700


def test_usual_images_are_no_rasters(tmp_path: Path):
    for number, (shape, options) in enumerate(
        [
            ((8, 9), {}),
            ((8, 9, 3), {"photometric": "rgb"}),
            ((8, 9, 4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
            ((8, 9, 2), {"extrasamples": ["unassalpha"]}),
            ((8, 9, 4), {"photometric": "separated"}),
        ]
    ):
        for dtype in (np.uint8, np.uint16):
            assert read(write(tmp_path / f"{number}.tif", np.zeros(shape, dtype), **options)) is None
    (tmp_path / "a.tif").write_bytes(b"II*\0 damaged")
    assert read(tmp_path / "a.tif") is None


def test_values_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="has no valid value"):
        read(write(tmp_path / "a.tif", np.full((8, 9), np.nan, np.float32)))
    monkeypatch.setattr(rasters, "MAX_INPUT_PX", 50)
    with pytest.raises(InputError, match="cut it into parts"):
        read(write(tmp_path / "b.tif", SURFACE))
    monkeypatch.setattr(tiff_library, "library", lambda: None)
    assert read(tmp_path / "b.tif") is None
    with pytest.raises(InputError, match=r"floating-point pixels; .* pip install moesr\[large\]"):
        reading.load(tmp_path / "b.tif")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_truncated_values_are_refused(tmp_path: Path, compression: str | None):
    path = write(
        tmp_path / "a.tif", BANDS.repeat(4, axis=2), planarconfig="separate", compression=compression
    )
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"a.tif: truncated or damaged \(.*\); get the file again"):
        read(path)


def test_a_declared_size_without_data_is_refused_at_once(tmp_path: Path):
    """The library would take zeros for a million strips that the file does not have."""
    path = write(tmp_path / "a.tif", SURFACE, rowsperstrip=1)
    data = bytearray(path.read_bytes())
    entry = re.search(rb"\x01\x01[\x03\x04]\0\x01\0\0\0", data)  # the number of rows
    assert entry
    data[entry.start() + 2 : entry.start() + 12] = struct.pack("<HII", 4, 1, 4_000_000)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"truncated or damaged .* of 4000000 strips"):
        read(path)


def test_uneven_values_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    values = SURFACE.repeat(8, axis=0).repeat(8, axis=1)
    values[0, 0] = 1e6
    with caplog.at_level(logging.WARNING, "moesr"):
        read(write(tmp_path / "a.tif", values))
    assert "few values lie far from all others" in caplog.text


def test_further_pages_are_named_unless_they_are_overviews(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for reduced in (True, False):
        path = write(tmp_path / "a.tif", SURFACE)
        write(path, SURFACE[::2, ::2], append=True, subfiletype=int(reduced))
        caplog.clear()
        assert read(path)
        assert ("has several pages; only the first is used" in caplog.text) is not reduced


def test_a_whole_run(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bands = [*BANDS[:4], np.where(Y < 5, -9999, SURFACE)]
    tags = [NO_DATA, *GROUND]
    source = write(
        tmp_path / "a.tif", np.stack(bands), planarconfig="separate", extratags=tags, description="hi"
    )
    assert run(engine, source, "--format", "tif") == 0
    result = tmp_path / "a_x4.tif"
    with tifffile.TiffFile(result) as file:
        page = file.pages[0]
        got, found = page.asarray(), {tag.code: tag.value for tag in page.tags.values()}
    assert got.shape == (5, 72, 88) and got.dtype == np.float32
    assert found[33550] == (2.5, 2.5, 0.0) and found[42113] == "-9999" and found[270] == "hi"
    assert (got[4, :20] == -9999).all() and (got[4, 20:] > -1000).all()
    error = got[0, 2::4, 2::4] - SURFACE  # close to the input, as the synthetic engine enlarges it
    assert np.abs(error[2:-2, 2:-2]).max() < 120
    assert provenance.read(result) and provenance.is_whole(result)
    data, made = result.read_bytes(), result.stat().st_mtime_ns
    assert run(engine, tmp_path, "--format", "tif") == 0  # the result is neither an input nor made again
    assert result.stat().st_mtime_ns == made and len(list(tmp_path.glob("*.tif"))) == 2
    assert "a_x4.tif" in capsys.readouterr().out
    result.write_bytes(data[:-1000])
    assert not provenance.is_whole(result)


def test_other_formats_are_refused(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write(tmp_path / "a.tif", SURFACE)
    assert run(engine, source) == OutputError.exit_code
    assert "only TIFF can hold 1 band of float32; use --format tif" in capsys.readouterr().err
