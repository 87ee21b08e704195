"""moesr-doctor on GPUs: what is missing and what does not fit is said, each in its line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from cuda_simulation import write_kernels
from fake_tensorrt import fake_library

from moesr.runtime import doctor_gpu, plans
from moesr.runtime.errors import EngineError


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine directory; no GPU, no library and an empty cache."""
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "cache"))
    for name in ("open_device", "load"):
        monkeypatch.setattr(doctor_gpu, name, missing(name))
    return tmp_path / "engine"


def missing(name: str):
    def raises(*given: object) -> None:
        raise EngineError(f"no {name} {given}")

    return raises


def with_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    device = SimpleNamespace(name="Fake GPU", compute_capability=capability)
    monkeypatch.setattr(doctor_gpu, "open_device", lambda index: device)
    monkeypatch.setattr(doctor_gpu, "driver_version", lambda: "13.2")
    monkeypatch.setattr(doctor_gpu, "load", lambda flavour: fake_library())


def test_a_machine_without_anything(engine):
    found = dict(doctor_gpu.findings(engine))
    assert found["gpu"] == "none usable: no open_device (0,)"
    assert found["tensorrt_rtx"] == "unusable: no load ('tensorrt_rtx',)"
    assert "no kernels there" in found["kernels"] and "moesr.kernels.build" in found["kernels"]
    assert found["plans"].startswith("none in ")


def test_what_fits_and_what_does_not(engine, monkeypatch):
    write_kernels(engine / "kernels", ["sm_86", "sm_90"])
    for capability in (86, 89):
        key = plans.PlanKey("ab" * 32, "tensorrt_rtx", "9.9", capability, 4)
        plans.write_plan(engine / "tensorrt", key, "expert_0.onnx", b"plan")
    with_gpu(monkeypatch, (8, 9))
    found = list(doctor_gpu.findings(engine))
    texts = [text for _, text in found]
    assert ("gpu", "Fake GPU, compute capability 8.9, driver for CUDA 13.2") in found
    assert ("tensorrt_rtx", "9.9") in found
    kernels = dict(found)["kernels"]
    assert kernels.endswith(": fit") and "for sm_86, sm_90" in kernels
    assert any("capability 8.9, up to 4 tiles: fit" in text for text in texts)
    assert any("capability 8.6, up to 4 tiles: stale, this is tensorrt_rtx 9.9 on 8.9" in t for t in texts)
    with_gpu(monkeypatch, (7, 5))
    assert "NOT for this GPU; make them with" in dict(doctor_gpu.findings(engine))["kernels"]
