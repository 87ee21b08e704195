"""Admission: images that exceed a GPU's free memory are refused or wait, and which graphs stay loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_backend
from engines import build_engine
from recording import FakeSession

from moesr.runtime import Upscaler
from moesr.runtime.backends import ort, ov
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends.selection import Backend
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import MemoryLimitError
from moesr.runtime.loop import admission, graph_memory
from moesr.runtime.loop.admission import Admission
from moesr.runtime.loop.graph_memory import BESIDE_GPU, GPU, HOST, WIDE, GraphMemory, MemoryPool
from moesr.runtime.loop.residency import Residency
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.system import memory

SIZE = 64, 64
IMAGE = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8)


class Rig:
    """An admission whose graphs are all open, with a given amount of free memory on GPU and host."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.manifest = read_manifest(directory)
        self.gpu, self.host = 1 << 40, 1 << 40
        monkeypatch.setattr(memory, "available_bytes", lambda: self.host)
        self.layout = TileLayout(self.manifest, *SIZE)
        self.graphs = GraphMemory(self.manifest, directory, "gpu", 4, gpu_bytes=lambda: self.gpu)
        residency = Residency(lambda role: FakeSession(self.manifest.graphs[role], np.asarray), True)
        for role in self.manifest.graphs:
            residency.get(role, None)
        self.admission = Admission(self.graphs, residency)
        self.admission.warm = True

    def need(self, pool: MemoryPool) -> int:
        return admission.image_bytes(self.layout, pool)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(build_engine(tmp_path / "engine"), monkeypatch)


def test_image_that_exceeds_the_gpu_is_refused(rig: Rig):
    rig.gpu = rig.need(GPU) - 1
    with pytest.raises(MemoryLimitError, match=r"64x64 to 256x256 .* of memory of the GPU, .* are free"):
        rig.admission.reserve(rig.layout)


def test_host_needs_memory_too(rig: Rig):
    rig.host = rig.need(BESIDE_GPU) - 1
    with pytest.raises(MemoryLimitError, match=r"needs about .* of memory, .* are free"):
        rig.admission.reserve(rig.layout)


@pytest.mark.parametrize(("share", "tile"), [(0.5, 128), (0.2, 64), (0.01, 0)])
def test_error_names_the_tile_that_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, tile: int
):
    """If not even one tile fits, a smaller one may, because working memory is proportional to its area."""
    rig = Rig(build_engine(tmp_path / "engine", tile=192), monkeypatch)
    rig.admission.warm = False
    work = 1 << 30
    monkeypatch.setattr(rig.graphs, "_work_per_tile", [work])
    rig.gpu = int(share * work)
    with pytest.raises(
        MemoryLimitError, match="not even one tile of 192 pixels fits beside the engine"
    ) as error:
        rig.admission.reserve(TileLayout(rig.manifest, *SIZE))
    assert (f"(moesr-export --tile {tile})" in str(error.value)) == bool(tile)
    assert ("moesr-export" in str(error.value)) == bool(tile)


def test_second_image_waits_for_the_first(rig: Rig):
    rig.gpu = int(1.5 * rig.need(GPU))
    room = rig.admission.reserve(rig.layout)
    assert room and rig.admission.reserve(rig.layout) is None
    room.release()
    assert rig.admission.reserve(rig.layout)


def test_memory_of_the_gpu_decides_whether_all_graphs_stay(rig: Rig, tmp_path: Path):
    weights = sum(rig.graphs.weights.values())
    for free, want in ((int(2 * GPU.held * weights) + 2, True), (int(2 * GPU.held * weights) - 2, False)):
        rig.gpu = free
        made = GraphMemory(rig.manifest, tmp_path / "engine", "gpu", 4, gpu_bytes=lambda: rig.gpu)
        assert made.keep_all is want


def test_images_wait_for_a_small_gpu_without_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """First there is memory for the graphs' buffers and one image, then for no image."""
    engine = build_engine(tmp_path / "engine")
    simulated_backend.install(monkeypatch, tmp_path / "kernels")
    with Upscaler(engine) as up:
        want = up(IMAGE, steps=2)
        device: Any = up._worker._device

        def leave(nbytes: int) -> None:
            device._collect()
            device._driver.set_free(nbytes)

        need = admission.image_bytes(TileLayout(up.manifest, *SIZE), GPU)
        leave(int(1.5 * need))
        most: list[int] = []
        reserve = up._admission.reserve

        def spy(*arguments: Any):
            room = reserve(*arguments)
            most.append(sum(r.stands for r in up._admission._reservations))
            return room

        monkeypatch.setattr(up._admission, "reserve", spy)
        for got in up.map([IMAGE] * 4, steps=2):
            np.testing.assert_array_equal(got, want)
        assert max(most) == 1
        leave(need // 2)
        with pytest.raises(MemoryLimitError, match="memory of the GPU"):
            up(IMAGE, steps=2)
        monkeypatch.setattr(up._admission, "reserve", lambda *arguments: admission.Reservation((0, 0)))
        with pytest.raises(MemoryLimitError, match="no memory"):  # the driver's own refusal
            up(IMAGE, steps=2)
        leave(1 << 30)
        np.testing.assert_array_equal(up(IMAGE, steps=2), want)


def test_wide_graph_needs_less_memory_per_weight(tmp_path, monkeypatch):
    """Its image fits in memory in which that of a narrow graph of the same size does not."""
    directory = build_engine(tmp_path / "engine", experts=1)
    manifest = read_manifest(directory)
    need = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(graph_memory, "WIDE_BYTES", limit)
        made = GraphMemory(manifest, directory, "cpu", 1)
        made.keep_all = False
        need.append(made.needed(HOST, frozenset(), warm=True))
    sizes = sorted(made.weights.values())
    narrow, wide = ((p.held * sizes[0] + p.opening * sizes[1]) for p in (HOST, WIDE))
    assert need == [int(narrow), int(wide)]


def test_large_graphs_that_open_quickly_are_not_all_kept(tmp_path, monkeypatch):
    directory = build_engine(tmp_path / "engine")
    manifest = read_manifest(directory)
    whole = GraphMemory(manifest, directory, "cpu", 1)
    size = int(HOST.held * sum(whole.weights.values()))
    for small, at_once, want in ((size, True, True), (size - 1, True, False), (size - 1, False, True)):
        monkeypatch.setattr(graph_memory, "SMALL", small)
        made = GraphMemory(manifest, directory, "cpu", 1, at_once=at_once)
        assert made.keep_all is want


def test_prepared_graphs_open_quickly(tmp_path):
    def opens_at_once(name: str, **options: object) -> bool:
        traits = {"openvino": ov.TRAITS, "onnxruntime": ort.TRAITS}[name]
        return Backend(name, SessionOptions(**options), 1, traits=traits).opens_at_once  # type: ignore[arg-type]

    assert opens_at_once("onnxruntime", cache=tmp_path)
    assert not opens_at_once("onnxruntime")
    assert not opens_at_once("onnxruntime", cache=tmp_path, device="cuda")
    assert not opens_at_once("openvino", cache=tmp_path)
