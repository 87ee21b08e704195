"""The search for kernels: per operator in the engine, the package and the user's cache."""

from __future__ import annotations

import json
import logging

import pytest
from cuda_simulation import SimulatedDriver, write_kernels

from moesr.kernels.registry import LOOP, OPS
from moesr.runtime.devices import kernel_search
from moesr.runtime.devices.cuda import CudaDevice
from moesr.runtime.devices.kernel_search import Kernels, find_kernels
from moesr.runtime.devices.loop_kernels import LoopKernels
from moesr.runtime.errors import EngineError


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Return the directories of the engine, the package and the cache, which are empty."""
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_search, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "engine" / "kernels", tmp_path / "shipped", tmp_path / "cache" / "cubins"


def test_operators_are_merged_from_all_places(tmp_path, places):
    engine, shipped, cache = places
    gather, blend, step = LOOP
    write_kernels(engine, ops=[blend])
    write_kernels(shipped, ops=[gather])
    write_kernels(cache / "sm_90", ops=[step])
    driver = SimulatedDriver()
    device = CudaDevice(driver, Kernels.of(tmp_path / "engine", driver))
    canvas = device.canvas((3, 4, 4))
    device.gaussian(canvas, 0, 0)
    assert device.download(canvas).any()


def test_kernels_of_the_engine_precede_those_of_the_package(tmp_path, places):
    for place in (*places[:2], places[2] / "sm_90"):
        write_kernels(place)
    assert find_kernels(tmp_path / "engine") == [*places[:2], places[2] / "sm_90"]
    assert find_kernels(None) == [places[1], places[2] / "sm_90"]
    driver = SimulatedDriver()
    device = CudaDevice(driver, Kernels.of(tmp_path / "engine", driver))
    for folder in (places[1], places[2] / "sm_90"):
        for file in (folder / "sm_90").iterdir():
            file.unlink()  # so that only the engine's can be loaded
    device.gaussian(device.canvas((3, 4, 4)), 0, 0)


def test_kernels_for_another_gpu_are_skipped(tmp_path, places, caplog):
    write_kernels(places[0], ["sm_80"])
    write_kernels(places[1], ["sm_90"])
    driver = SimulatedDriver(90)
    with caplog.at_level(logging.WARNING, "moesr"):
        LoopKernels(Kernels.of(tmp_path / "engine", driver))
    assert "compiled for sm_80, but Simulated GPU is sm_90" in caplog.text


def test_error_names_the_searched_folder(tmp_path, places):
    write_kernels(places[1], ["sm_80"])
    folder = rf"kernels\.build --arch sm_103 -o .*{places[2].name}/sm_103"
    with pytest.raises(EngineError, match="compiled for sm_80"):
        Kernels.of(tmp_path / "engine", SimulatedDriver(103))
    write_kernels(places[1], ["ptx"])
    kernels = Kernels.of(tmp_path / "engine", SimulatedDriver(103))
    with pytest.raises(EngineError, match=f"no fp16 kernel of aff_filter with channels 7; .*{folder}"):
        kernels.plan("aff_filter", "fp16", {"channels": 7})


def test_tables_come_from_the_directory_that_has_them(tmp_path, places):
    write_kernels(places[1])
    write_kernels(places[2] / "sm_90", ops=[OPS["aff_filter"]], dtype="fp16")
    kernels = Kernels.of(None, SimulatedDriver())
    index = json.loads((places[2] / "sm_90" / "kernels.json").read_text())
    plan = kernels.plan("aff_filter", "fp16", index["plans"][0]["shape"])
    tables = [buffer for buffer in plan.buffers if buffer.role == "table"]
    assert tables and all(kernels.table(buffer) for buffer in tables)


def test_shipped_kernels_suffice_for_the_loop_on_all_architectures():
    """Only the index is read: the files hold machine code, which no simulation runs."""
    for capability in (80, 86, 87, 89, 90, 100, 103, 120, 121):
        driver = SimulatedDriver(capability)
        kernels = Kernels([kernel_search.SHIPPED], driver)
        LoopKernels(kernels)
        exact = capability in (80, 86, 89, 90, 100, 120)
        nearest = {87: "sm_86"}.get(capability, "ptx")
        assert kernels.architecture == (f"sm_{capability}" if exact else nearest)
