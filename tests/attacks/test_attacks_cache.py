"""A damaged cache never changes a result or stops a run, and the damage does not persist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine
from hostile_cache import DAMAGES, keeping_stamp, zero_second_half
from hostile_images import picture

from moesr.runtime import Upscaler
from moesr.runtime.backends import autotune
from moesr.runtime.backends.selection import BACKENDS

IMAGE = np.asarray(picture())
KINDS = {
    # name: (backend, pattern of the files to damage)
    "measurements": ("auto", "fastest/*.json"),
    "ort_entry": ("onnxruntime", "prepared/*/entry.json"),
    "ort_graph": ("onnxruntime", "prepared/*/graph.onnx"),
    "openvino_entry": ("openvino", "prepared/*/entry.json"),
    "openvino_graph": ("openvino", "prepared/*/graph.blob"),
}
SLOW = ("empty", "nested", "digits_400", "flipped_byte", "fifo", "endless_device")
"""Only these kinds of damage are tried on backends that take long to prepare or measure a graph."""

ROWS = [
    pytest.param(*row, damage, id=f"{kind}-{name}")
    for kind, row in KINDS.items()
    for name, damage in DAMAGES.items()
    if row[0] == "onnxruntime" or name in SLOW
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=1, experts=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("openvino")
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(BACKENDS, "onnxruntime", "moesr.runtime.backends.ort")
    monkeypatch.setitem(BACKENDS, "openvino", "moesr.runtime.backends.ov")
    return tmp_path / "cache"


def result(engine: Path | str, backend: str) -> np.ndarray:
    autotune._measured.clear()
    with Upscaler(engine, backend=backend, threads=1) as upscaler:
        return upscaler(IMAGE, steps=1)


@pytest.mark.parametrize(("backend", "pattern", "damage"), ROWS)
def test_damaged_file_does_not_change_the_result(
    backend: str, pattern: str, damage: Callable[[Path], object], engine: Path, cache: Path
):
    want = result(engine, backend)
    paths = sorted(cache.glob(pattern))
    assert paths
    for path in paths:
        damage(path)
    tolerance = 1 if backend == "auto" else 0  # a new measurement may choose another backend
    assert np.abs(result(engine, backend).astype(int) - want).max() <= tolerance


def test_damaged_weights_of_a_prepared_graph_do_not_change_the_result(cache: Path):
    """The weights file of a prepared graph is damaged while its size and its times stay the same."""
    want = result("demo-x4", "onnxruntime")
    paths = sorted(cache.glob("prepared/*/weights.bin"))
    assert paths
    for path in paths:
        keeping_stamp(zero_second_half)(path)
    assert np.array_equal(result("demo-x4", "onnxruntime"), want)


@pytest.mark.parametrize("name", ["fastest", "prepared", "prepared/onnxruntime-foreign"])
def test_foreign_entries_are_left_alone_or_removed(name: str, engine: Path, cache: Path):
    want = result(engine, "onnxruntime")
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "entry.json").write_text("[" * 200_000)
    (folder / "link").symlink_to(folder)
    assert np.array_equal(result(engine, "onnxruntime"), want)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/dev/null")])
def test_cache_path_that_is_not_a_directory(make: Callable[[Path], object], engine: Path, cache: Path):
    make(cache)
    want = result(engine, "onnxruntime")
    assert np.array_equal(result(engine, "onnxruntime"), want)
