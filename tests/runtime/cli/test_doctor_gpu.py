"""moesr-doctor on GPUs: it prints one line for each part that is missing or does not fit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from cuda_simulation import write_kernels
from engines import build_engine
from fake_tensorrt import fake_library

from moesr.runtime.backends.base import Offer
from moesr.runtime.backends.tensorrt import plan_store
from moesr.runtime.cli import doctor, doctor_gpu
from moesr.runtime.devices import compiled_kernels, kernel_search
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError
from moesr.runtime.system import user_cache


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Return an engine directory on a machine that has no GPU and no library and whose cache is empty."""
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "cache"))
    for name in ("open_device", "load", "probe"):
        monkeypatch.setattr(doctor_gpu, name, missing(name))
    return build_engine(tmp_path / "engine")


def findings(engine: Path) -> list[tuple[str, str]]:
    return list(doctor_gpu.findings(engine, read_manifest(engine), 0, user_cache.directory()))


def missing(name: str):
    def raises(*given: object) -> None:
        raise EngineError(f"no {name} {given}")

    return raises


def with_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    device = SimpleNamespace(name="Fake GPU", compute_capability=capability)
    monkeypatch.setattr(doctor_gpu, "open_device", lambda index: device)
    monkeypatch.setattr(doctor_gpu, "driver_version", lambda: "13.2")
    monkeypatch.setattr(doctor_gpu, "memory_bytes", lambda: (3 * 10**9, 24 * 10**9))
    monkeypatch.setattr(doctor_gpu, "load", lambda flavour: fake_library())


def test_machine_without_gpu_and_libraries(engine):
    found = dict(findings(engine))
    assert found["gpu"] == "none usable: no open_device (0,)"
    assert found["tensorrt_rtx"] == "unusable: no load ('tensorrt_rtx',)"
    assert str(kernel_search.SHIPPED) in found["kernels"]
    assert found["plans"].startswith("none in ")


@pytest.mark.parametrize("release", ["12.8", "13.0"])
def test_a_driver_that_is_older_than_the_libraries_is_named(engine, monkeypatch, release):
    with_gpu(monkeypatch, (8, 9))
    monkeypatch.setattr(doctor_gpu, "driver_version", lambda: release)
    monkeypatch.setattr(doctor_gpu.importlib.metadata, "version", lambda package: "13.5.0")
    text = dict(findings(engine))["gpu"]
    assert text.endswith("for CUDA 13: update the driver") == (release == "12.8")


def test_plans_and_kernels_that_fit_or_do_not(engine, monkeypatch):
    write_kernels(engine / "kernels", ["sm_86", "sm_90"])
    for capability in (86, 89):
        key = plan_store.PlanKey("ab" * 32, "tensorrt_rtx", "9.9", capability, 4)
        plan_store.write_plan(engine / "tensorrt", key, "expert_0.onnx", b"plan")
    with_gpu(monkeypatch, (8, 9))
    found = findings(engine)
    texts = [text for _, text in found]
    gpu = "Fake GPU, compute capability 8.9, driver for CUDA 13.2, 3.0 GB of 24.0 GB free"
    assert ("gpu", gpu) in found
    assert ("tensorrt_rtx", "9.9") in found
    kernels = [text for label, text in found if label == "kernels"]
    assert len(kernels) == 2 and all(text.endswith(": fit") for text in kernels)
    assert "for sm_86, sm_90" in kernels[0] and str(kernel_search.SHIPPED) in kernels[1]
    assert any("capability 8.9, up to 4 tiles: fit" in text for text in texts)
    assert any("capability 8.6, up to 4 tiles: stale, this is tensorrt_rtx 9.9 on 8.9" in t for t in texts)
    with_gpu(monkeypatch, (7, 5))
    assert "NOT for this GPU; make them with" in dict(findings(engine))["kernels"]


def test_missing_plans_are_named(engine, monkeypatch):
    with_gpu(monkeypatch, (8, 9))
    manifest = read_manifest(engine)
    assert dict(findings(engine))["plans needed"] == (
        "0 of 5 for tensorrt_rtx 9.9 on 8.9; missing: expert_0.onnx, expert_1.onnx, expert_2.onnx, "
        "expert_3.onnx, ..: each is built when first used, or by moesr-export --tensorrt"
    )
    for graph in manifest.graphs.values():
        key = plan_store.PlanKey(graph.sha256, "tensorrt_rtx", "9.9", 89, 4)
        plan_store.write_plan(engine / "tensorrt", key, graph.file, b"plan")
    assert dict(findings(engine))["plans needed"] == "5 of 5 for tensorrt_rtx 9.9 on 8.9"


def test_given_device_and_cache_are_examined(engine, tmp_path, monkeypatch, capsys):
    seen = []
    with_gpu(monkeypatch, (8, 9))
    monkeypatch.setattr(
        doctor_gpu, "open_device", lambda index: seen.append(index) or missing("second GPU")(index)
    )
    key = plan_store.PlanKey("ab" * 32, "tensorrt_rtx", "9.9", 89, 4)
    plan_store.write_plan(tmp_path / "mine" / plan_store.PLANS_FOLDER, key, "expert_0.onnx", b"plan")
    given = ["--engine", str(engine), "--device", "cuda:1", "--cache", str(tmp_path / "mine")]
    assert doctor.main(given) == 3  # no backend offers this GPU
    assert seen == [1]
    out = capsys.readouterr().out
    assert "none usable: no second GPU (1,)" in out
    assert f"in {tmp_path / 'mine'}" in out and f"in {tmp_path / 'cache'}" not in out
    assert doctor.main(["--engine", str(engine), "--device", "cuda:x"]) == 2
    assert doctor.main(["--engine", str(engine), "--no-cache"]) == 0
    assert seen == [1, 0]


def test_onnxruntime_for_cpus_is_named(engine, monkeypatch):
    with_gpu(monkeypatch, (8, 9))
    wants = ({"cpu": 1}, r"1.31 is for CPUs; .*moesr\[cuda\]"), ({"cuda": 4}, "offered by 1.31")
    for devices, want in wants:
        monkeypatch.setattr(doctor_gpu, "probe", lambda name, devices=devices: Offer("1.31", devices))
        assert re.match(want, dict(findings(engine))["onnxruntime cuda"])


@pytest.mark.parametrize(
    ("toolkit", "driver", "warned"),
    [("13.4", "13.2", True), ("12.8", "12.10", False), ("12.8", "13.0", False), ("", "12.0", False)],
)
def test_kernels_newer_than_the_driver_are_named(tmp_path, toolkit, driver, warned):
    index = compiled_kernels.read(write_kernels(tmp_path, ["sm_90"]))
    (tmp_path / "kernels.json").write_text(dataclasses.replace(index, toolkit=toolkit).to_json())
    said = doctor_gpu.kernels(tmp_path, 90, driver)
    assert ": fit" in said and ("update the driver" in said) is warned
