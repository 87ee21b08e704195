"""Spooled images: the values of images in memory, bounded memory, disk space, and what short memory does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import build_engine
from PIL import Image

from moesr.runtime import Upscaler
from moesr.runtime.errors import MemoryLimitError, OutputError
from moesr.runtime.images import color_rows, spool
from moesr.runtime.images.color import COLOR_FIXES
from moesr.runtime.images.reading import LoadedImage
from moesr.runtime.images.rows import PlacedImage, SpooledImage
from moesr.runtime.loop import admission, job
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.system import memory

RNG = np.random.default_rng(3)
ENGINES: dict[str, dict[str, Any]] = {"pad": {}, "encoder": {"encoder": True, "scale": 2}}


@pytest.fixture(scope="module", params=ENGINES)
def up(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    directory = build_engine(tmp_path_factory.mktemp("engine") / "e", tile=32, **ENGINES[request.param])
    with Upscaler(directory) as opened:
        yield opened


def picture(height: int, width: int, channels: int, dtype: type) -> np.ndarray:
    """Waves and noise with a flat white region; uint16 uses the whole range."""
    y, x = np.mgrid[0:height, 0:width]
    values = (
        0.5 + 0.4 * np.sin(x / 3 + y / 5)[..., None] + 0.05 * RNG.standard_normal((height, width, channels))
    )
    values[height // 3 : -4, 6:-5] = 1.0
    pixels = (np.clip(values, 0, 1) * np.iinfo(dtype).max).astype(dtype)
    return pixels[..., 0] if channels == 1 else pixels


def both(up: Upscaler, image: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any]:
    """The result in memory, and the spooled one."""
    monkeypatch.setattr(color_rows, "STRIP_PX", 600)
    monkeypatch.setattr(job, "ROWS_AT_ONCE", 12)
    results = []
    for limit in (1 << 60, 1):
        monkeypatch.setattr(admission, "SPOOL_FROM_PX", limit)
        results.append(up(image, steps=2, **options))
    return results[0], results[1]


@pytest.mark.parametrize("fix", COLOR_FIXES)
@pytest.mark.parametrize(("channels", "dtype"), [(3, np.uint8), (4, np.uint8), (1, np.uint16), (2, np.uint8)])
def test_values_are_those_of_an_image_in_memory(
    up: Upscaler, monkeypatch: pytest.MonkeyPatch, channels: int, dtype: type, fix: str
):
    image = picture(31, 27, channels, dtype)
    held, spooled = both(up, image, monkeypatch, color_fix=fix)
    assert (spooled.shape, spooled.dtype) == (held.shape, held.dtype)
    np.testing.assert_array_equal(spooled, held)
    assert np.ptp(held) > 0


def test_a_loaded_image_keeps_its_spool_and_leaves_no_file(up: Upscaler, tmp_path: Path, monkeypatch):
    place = tmp_path / "new" / "folder"
    image = PlacedImage(picture(20, 24, 3, np.uint8), folder=place)
    held, spooled = both(up, image, monkeypatch)
    assert type(held) is LoadedImage and isinstance(spooled, SpooledImage)
    np.testing.assert_array_equal(spooled.pixels, held.pixels)
    assert not list(tmp_path.iterdir())
    pil, other = both(up, Image.fromarray(image.pixels), monkeypatch)
    np.testing.assert_array_equal(np.asarray(pil), np.asarray(other))


def test_a_gpu_writes_its_result_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import simulated_backend

    engine = build_engine(tmp_path / "engine")
    simulated_backend.install(monkeypatch, tmp_path / "kernels")
    with Upscaler(engine) as gpu:
        held, spooled = both(gpu, picture(24, 20, 3, np.uint8), monkeypatch)
    np.testing.assert_array_equal(spooled, held)


def test_a_full_disk_ends_the_image_before_any_work(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(admission, "SPOOL_FROM_PX", 1)
    monkeypatch.setattr(spool, "SPARE_BYTES", 1 << 60)
    ran = up.statistics.tiles
    with pytest.raises(OutputError, match="of disk for temporary files"):
        up(picture(20, 24, 3, np.uint8), steps=2)
    assert up.statistics.tiles == ran


def test_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """First fewer tiles per run, then a spool, then an error that says what would fit."""
    caplog.set_level("INFO", "moesr")
    engine = build_engine(tmp_path / "engine", tile=32)
    monkeypatch.setattr(admission, "STRIP_PX", 1000)
    monkeypatch.setattr(color_rows, "STRIP_PX", 1000)
    free = [1 << 40]
    monkeypatch.setattr(memory, "available_bytes", lambda: free[0])
    image = picture(400, 60, 3, np.uint8)
    layout, larger = TileLayout_of(engine, image), None
    need = admission.image_bytes(layout), admission.spooled_bytes(layout)
    assert need[1] < need[0] // 2
    results = {}
    for case in ("enough", "batch", "spool"):
        with Upscaler(engine, max_batch=4) as up:
            monkeypatch.setattr(up._admission._graphs, "_work_per_tile", [1000])
            graphs = up._admission._needed(up._admission._graphs.pools[0], 1) - 1000
            free[0] = (
                graphs + {"enough": 4000 + need[0], "batch": 2500 + need[0], "spool": 1000 + need[1]}[case]
            )
            assert up._admission.expected(layout, up._settings({"steps": 1}))[0] == graphs + 4000 + need[0]
            caplog.clear()
            results[case] = up(image, steps=1)
            lines = caplog.text
            assert ("2 tiles per run instead of 4" in lines) == (case == "batch")
            assert ("1 tiles per run instead of 4" in lines) == (case == "spool")
            assert ("go to temporary files" in lines) == (case == "spool")
            assert up.statistics.max_batch == {"enough": 4, "batch": 2, "spool": 1}[case]
            free[0] = need[1] // 2
            with pytest.raises(MemoryLimitError, match=r"; (\d+)x\d+ pixels would fit: close") as error:
                up(image, steps=1)
            larger = str(error.value)
    assert larger and int(larger.split("; ")[1].split("x")[0]) < 60
    np.testing.assert_array_equal(results["enough"], results["batch"])
    np.testing.assert_array_equal(results["enough"], results["spool"])


def TileLayout_of(engine: Path, image: np.ndarray) -> TileLayout:
    from moesr.runtime.engine.manifest_file import read_manifest

    return TileLayout(read_manifest(engine), *image.shape[:2])


LIMITED = """
import resource, sys
from moesr.runtime.cli.run import main
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + (300 << 20),) * 2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process")
def test_a_limit_of_the_process_counts(tmp_path: Path):
    engine = build_engine(tmp_path / "engine")
    Image.fromarray(picture(2500, 2500, 3, np.uint8)).save(tmp_path / "a.png", compress_level=1)
    arguments = ["--engine", engine, "--backend", "onnxruntime", "--threads", "1", tmp_path / "a.png"]
    done = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert "pixels would fit" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "engine"]
