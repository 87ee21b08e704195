"""A backend for the simulated GPU that computes with ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from cuda_simulation import SimulatedDriver, write_kernels

from moesr.runtime.backends import selection
from moesr.runtime.backends.base import Offer, SessionOptions
from moesr.runtime.devices import cuda_driver
from moesr.runtime.devices.cuda import Buffer
from moesr.runtime.engine.graph_spec import Boundary


class OnnxSession:
    """A `Session` that runs a graph between buffers of the simulated GPU."""

    capturable = True

    def __init__(self, path: Path, declared: Boundary) -> None:
        settings = ort.SessionOptions()
        settings.log_severity_level = 4
        self._session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        names = {value.name for value in self._session.get_inputs()}
        self.boundary, self._path = declared.only(names), path

    def bind(self, buffers: Mapping[str, Buffer], max_batch: int) -> None:
        self._buffers = buffers

    def enqueue(self, batch: int) -> None:
        buffers = self._buffers
        driver = next(iter(buffers.values())).driver
        assert isinstance(driver, SimulatedDriver)

        def run() -> None:
            arrays = {}
            for name, buffer in buffers.items():
                shape = buffer.spec.shape(batch)
                arrays[name] = driver.view(buffer.address, int(np.prod(shape)), np.float32).reshape(shape)
            outputs = [spec.name for spec in self.boundary.outputs]
            given = {spec.name: arrays[spec.name] for spec in self.boundary.inputs}
            for name, value in zip(outputs, self._session.run(outputs, given), strict=True):
                arrays[name][...] = np.asarray(value)

        driver.library_call(f"run {self._path.name}", run)

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def probe() -> Offer:
    return Offer("1.0", {"cuda": 4})


def open_session(path: Path, declared: Boundary, options: SessionOptions) -> OnnxSession:
    return OnnxSession(path, declared)


def release() -> None:
    pass


def install(monkeypatch: pytest.MonkeyPatch, kernels: Path, memory_bytes: int | None = None) -> None:
    """Make the simulated GPU the only GPU and this backend the only backend; writes `kernels`."""
    write_kernels(kernels)
    monkeypatch.setattr("moesr.runtime.devices.kernel_search.find_kernels", lambda engine: [kernels])
    monkeypatch.setattr(cuda_driver, "CudaDriver", lambda index: SimulatedDriver(memory_bytes=memory_bytes))
    monkeypatch.setattr(selection, "BACKENDS", {"simulated": __name__})
