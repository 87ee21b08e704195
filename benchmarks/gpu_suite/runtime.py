"""The runtime sections of benchmarks/gpu.py: its loop with every installed backend."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpu_suite.engine import write_engine, write_stand_in
from gpu_suite.setup import (
    SEED,
    TOLERANCE,
    Absent,
    Report,
    Setup,
    T,
    absent_unless_there,
    inputs,
    of_matrix_rate,
    seconds_each,
)
from moesr.runtime import Upscaler
from moesr.runtime.backends.selection import candidates
from moesr.runtime.devices import cuda_driver
from moesr.runtime.devices.interface import Canvas, Device, Mean, Session, Slot
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError, MemoryLimitError, MoesrError
from moesr.runtime.sampling import noise
from moesr.runtime.system.relative_error import relative_l2

ROLES = {"expert_0": "step", "decoder": "decode"}


def prepare(setup: Setup, report: Report) -> None:
    """Write the stand-in engine, whose networks run in PyTorch, and the host's results for comparison."""
    absent_unless_there("torch")
    write_stand_in(setup)
    start = time.perf_counter()
    importlib.import_module("gpu_suite.networks").reference(setup)
    report.row("host", "a step and a decode for comparison", time.perf_counter() - start, "s")


@dataclass(frozen=True)
class Subject:
    """A backend with an engine directory, and its name in the report."""

    name: str
    backend: str
    directory: Path


def measure_backend(setup: Setup, report: Report, subject: Subject) -> None:
    """Check and time a step and a decode, then time images one by one and in batches."""
    backend = candidates(subject.backend, "cuda", max_batch=max(setup.batches), cache=setup.cache)[0]
    manifest = read_manifest(subject.directory)
    used = cuda_driver.memory_bytes()
    device = backend.device(subject.directory)
    want = dict(np.load(setup.reference)) if setup.reference.is_file() else {}
    for role, what in ROLES.items():
        start = time.perf_counter()
        session = backend.open(subject.directory, manifest.graphs[role], device.stream)
        ticks = Ticks(device, session, manifest, role, max(setup.batches))
        ticks.run(1)
        got = ticks.result()
        report.row(subject.name, f"opening and a first {what}", time.perf_counter() - start, "s")
        if role in want:
            report.check(f"{subject.name}: {role}", relative_l2(got, want[role]), TOLERANCE)
        for batch in setup.batches:
            if report.left < 5:
                report.note(f"{subject.name}: no time was left for a {what} of {batch} and more")
                break
            seconds = seconds_each(partial(ticks.run, batch), ticks.wait)
            share = of_matrix_rate(setup, manifest.graphs[role].macs * batch, seconds)
            report.row(subject.name, what, 1e3 * seconds, "ms", batch, **share)
        session.close()
    free, total = cuda_driver.memory_bytes()
    report.row(subject.name, "memory of the GPU in use", (total - free) / 1e9, "GB", max(setup.batches))
    report.row(subject.name, "memory of the GPU taken", (used[0] - free) / 1e9, "GB", max(setup.batches))
    device.close()
    backend.release()
    measure_images(setup, report, subject)


class Ticks:
    """Runs ticks of one graph over equal tiles."""

    def __init__(self, device: Device, session: Session, manifest: Manifest, role: str, batch: int) -> None:
        given, m = inputs(manifest.tile), manifest
        self._device, self._session = device, session
        specs = (*session.boundary.inputs, *session.boundary.outputs)
        self._buffers = {spec.name: device.buffer(spec, batch) for spec in specs}
        session.bind(self._buffers, batch)
        self._z = device.canvas((3, m.latent_tile, m.latent_tile))
        device.gaussian(self._z, SEED, noise.INITIAL_NOISE)
        size, factor = (m.tile, m.latent_factor) if role == "decoder" else (m.latent_tile, 1)
        self._means = [self._mean(size, factor) for _ in range(batch)]
        canvases: dict[str, Canvas] = {
            "z": self._z,
            "z_t": self._z,
            "cond": device.upload(given["cond"]),
            "lr": device.upload(given["lr"], m.latent_factor),
        }
        names = {spec.name for spec in session.boundary.inputs}
        sources = {name: canvas for name, canvas in canvases.items() if name in names}
        scalars = {name: value for name, value in {"t": float(T), "fidelity": 1.0}.items() if name in names}
        self._slots = [Slot(sources, scalars, mean, 0, 0) for mean in self._means]

    def _mean(self, size: int, factor: int) -> Mean:
        return self._device.mean((3, size, size), [(0, 0)], np.ones((size, size), np.float32), factor)

    def run(self, batch: int) -> None:
        """Run one tick."""
        self._device.tick(self._slots[:batch], self._session, self._buffers)

    def capture(self) -> None:
        """Capture one run of the graph as a CUDA graph and discard it; raises the error if that fails."""
        driver = next(iter(self._buffers.values())).driver
        driver.begin_capture()
        try:
            self._session.enqueue(1)
        except BaseException:
            driver.abandon_capture()
            raise
        driver.end_capture()

    def wait(self) -> None:
        """Wait for all ticks."""
        self._device.finite(self._means[0])

    def result(self) -> np.ndarray:
        """Return the result of the first tile in the first tick."""
        return self._device.download(self._means[0]).copy()


def measure_images(setup: Setup, report: Report, subject: Subject) -> None:
    """Time images through the whole runtime: the first, then one by one, then many at once."""
    small = inputs(setup.tile)["cond"]
    most, begun = max(setup.batches), time.perf_counter()
    options: dict[str, Any] = {"backend": subject.backend, "device": "cuda", "cache": setup.cache}
    with Upscaler(subject.directory, max_batch=most, **options) as up:
        up(small, steps=setup.steps[0])
        report.row(subject.name, f"first image of {setup.steps[0]} steps", time.perf_counter() - begun, "s")
        for steps in setup.steps:
            for batch in setup.batches:
                if report.left < 5:
                    report.note(f"{subject.name}: no time was left for {batch} images of {steps} steps")
                    return
                up(small, steps=1)
                taken = min(_images(up, small, batch, steps) for _ in range(2))
                report.row(subject.name, f"image of {steps} steps", 1e3 * taken / batch, "ms each", batch)


def _images(up: Upscaler, image: np.ndarray, count: int, steps: int) -> float:
    start = time.perf_counter()
    for _ in up.map([image] * count, steps=steps):
        pass
    return time.perf_counter() - start


def measure_pytorch(setup: Setup, report: Report) -> None:
    """Measure the runtime's loop with PyTorch's networks, in its CUDA graphs if possible."""
    absent_unless_there("torch", "cuda.core")
    from gpu_suite import networks, torch_backend

    made = networks.calls(setup, networks.device_of())
    torch_backend.install({"expert": made["expert_0"], "decoder": made["decoder"]})
    write_stand_in(setup)
    try:
        _capture_expert(setup, torch_backend.NAME)
    except (EngineError, RuntimeError) as error:  # PyTorch raises RuntimeError
        report.note(f"networks of PyTorch do not become part of the device's graphs: {error}")
        torch_backend.ONE_GRAPH = False
    way = "one graph" if torch_backend.ONE_GRAPH else "launched"
    measure_backend(setup, report, Subject(f"runtime over PyTorch, {way}", torch_backend.NAME, setup.engine))


def _capture_expert(setup: Setup, name: str) -> None:
    """Capture an expert once; a device would only log the error, and its ticks would run launch by launch."""
    backend, manifest = candidates(name, "cuda", max_batch=1)[0], read_manifest(setup.engine)
    device = backend.device(setup.engine)
    session = backend.open(setup.engine, manifest.graphs["expert_0"], device.stream)
    try:
        ticks = Ticks(device, session, manifest, "expert_0", 1)
        ticks.run(1)  # libraries initialize in their first run, which cannot be captured
        ticks.wait()
        ticks.capture()
    finally:
        session.close()
        device.close()
        backend.release()


def measure_library(setup: Setup, report: Report, backend: str, modules: Sequence[str]) -> None:
    """Measure a backend of the runtime with graphs exported for it."""
    absent_unless_there("torch", "onnx", "cuda.core")
    found = [module for module in modules if importlib.util.find_spec(module)]
    if not found:
        raise Absent(f"none of {', '.join(modules)} is installed")
    try:
        candidates(backend, "cuda")
    except MoesrError as error:
        raise Absent(str(error)) from error
    start, directory = time.perf_counter(), setup.exported(backend)
    write_engine(setup, directory, parts=backend == "tensorrt")
    report.row("export", "graphs for a GPU, fp16", time.perf_counter() - start, "s")
    try:
        measure_backend(setup, report, Subject(f"runtime over {found[0]}", backend, directory))
    except MemoryLimitError as error:
        report.note(f"{backend}: {error}")
