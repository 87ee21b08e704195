"""Finding the backends that can run an engine on this machine; an explicit choice is never replaced."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from moesr.runtime.backends.base import Offer, SessionOptions, Traits
from moesr.runtime.devices.capture_lock import capture_lock
from moesr.runtime.devices.host import HostDevice
from moesr.runtime.devices.interface import Device, Session
from moesr.runtime.engine.graph_spec import Graph
from moesr.runtime.errors import EngineError, UsageError
from moesr.runtime.options import MAX_BATCH, PRECISIONS, check_device, check_threads, whole
from moesr.runtime.system import cpu

BACKENDS = {
    "tensorrt": "moesr.runtime.backends.tensorrt.backend",
    "onnxruntime": "moesr.runtime.backends.ort",
    "openvino": "moesr.runtime.backends.ov",
}
"""The module of each backend, in order of preference."""

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class Backend:
    """A backend whose library loads, with the options of its sessions."""

    name: str
    options: SessionOptions
    max_batch: int  # number of tiles in one run
    version: str = field(default="", kw_only=True)
    traits: Traits = field(default=Traits(), kw_only=True)

    @property
    def label(self) -> str:
        """The name of the backend, with the precision if that differs from the graph's."""
        return f"{self.name} {self.options.precision}" if self.options.precision else self.name

    @property
    def target(self) -> str:
        """The target of the graphs' arrangement; see `Graph.arrangement`."""
        if self.options.kind != "cpu":
            return "parts" if self.traits.runs_parts else "gpu"
        return "plain" if self.traits.plain_graphs else "cpu"

    @property
    def shares_memory(self) -> bool:
        """Whether its sessions, which run in turn, share their working memory."""
        return not self.traits.memory_per_session

    @property
    def opens_at_once(self) -> bool:
        """Whether its graphs, once prepared, are mapped from a file."""
        mapped = self.traits.maps_prepared and self.options.kind == "cpu"
        return mapped and self.options.cache is not None

    def device(self, directory: Path | None = None) -> Device:
        """Open the device whose buffers its sessions use; `directory` is the engine's and may hold kernels.

        EngineError is raised if a GPU, its driver or the kernels for it are missing.
        """
        if self.options.kind == "cpu":
            return HostDevice()
        from moesr.runtime.devices.cuda import CudaDevice
        from moesr.runtime.devices.cuda_driver import CudaDriver  # not imported for a CPU
        from moesr.runtime.devices.kernel_search import Kernels

        driver = CudaDriver(self.options.index)
        kernels = Kernels.of(directory, driver)
        log.info("on %s with kernels for %s", driver.name, kernels.architecture)
        return CudaDevice(driver, kernels, use_graphs=self.options.cuda_graphs)

    def open(self, directory: Path, graph: Graph, stream: int | None = None) -> Session:
        """Open one graph of an engine to run on a device's stream; EngineError if it cannot be opened."""
        files = graph.arrangement(self.target).files
        options = replace(self.options, stream=stream, max_batch=self.max_batch, files=files)
        module, path = importlib.import_module(BACKENDS[self.name]), directory / files[0].file
        with capture_lock if options.kind != "cpu" else contextlib.nullcontext():
            return module.open_session(path, graph.boundary, options)

    def open_float32(self, directory: Path, graph: Graph) -> Session | None:
        """Open a graph of an engine so that every value is float32; None if `open` does that already.

        The engine's float32 variant is used if it has one. Otherwise a graph is derived from its file, which
        is not cached. EngineError if it cannot be opened, or if the device is no CPU.
        """
        if self.options.kind != "cpu":
            raise EngineError("graphs are run again in float32 on CPUs only")
        used = graph.arrangement(self.target)
        others = (graph, *(variant for target, variant in graph.variants.items() if target != "parts"))
        plain = next((each for each in (used, *others) if each.precision == "fp32"), None)
        if plain is used and self.options.precision is None:
            return None
        options = replace(self.options, precision=None, max_batch=1)
        options = replace(options, files=plain.files) if plain else replace(options, float32=True, cache=None)
        module, path = importlib.import_module(BACKENDS[self.name]), directory / (plain or used).file
        return module.open_session(path, graph.boundary, options)

    def release(self) -> None:
        """Free the memory that the library keeps for further sessions."""
        importlib.import_module(BACKENDS[self.name]).release()

    def announce(self, why: str) -> None:
        """Log that this backend was chosen, and why."""
        log.info("backend %s %s on %s (%s)", self.label, self.version, self.options.device, why)

    def warn(self, precision: str) -> None:
        """Log a warning if this backend may compute graphs of this precision wrongly."""
        here = self.name == "onnxruntime" and self.options.kind == "cpu" and cpu.int8_may_saturate()
        if precision == "int8" and here:
            log.warning(
                "this CPU has no VNNI, without which onnxruntime's 8-bit products may overflow and "
                "give wrong images; use a float32 engine, or --backend openvino"
            )


def probe(name: str) -> Offer:
    """Return the offer of a backend; EngineError says what to install if its library does not load."""
    return importlib.import_module(BACKENDS[name]).probe()


def select_backend(
    name: str = "auto", device: str | None = None, threads: int | None = None, max_batch: int | None = None
) -> Backend:
    """Return the preferred one of `candidates`, for callers that have no engine to measure them on."""
    backend = candidates(name, device, threads, max_batch)[0]
    backend.announce("the first whose library loads" if name == "auto" else "asked for")
    return backend


def candidates(
    name: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    max_batch: int | None = None,
    *,
    precision: str = "graph",
    cache: Path | None = None,
    cuda_graphs: bool = True,
    verify: bool = True,
) -> list[Backend]:
    """Return the backends to choose from, at least one, in order of preference.

    "auto" stands for all of `BACKENDS` that load. Without `device` each uses its fastest device, and only the
    backends on the device of the first are kept. `precision` "auto" stands for all that a backend offers.
    `cache` is the directory for compiled graphs; with `verify` their checksums are compared. Without
    `cuda_graphs` a GPU runs launch by launch. An explicit name, device or precision is used or refused
    (UsageError, EngineError), never replaced.
    """
    if name != "auto" and name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    device, threads = check_device(device), check_threads(threads)
    if max_batch is not None:
        whole("max_batch", max_batch, 1, MAX_BATCH)
    found: list[Backend] = []
    failures = []
    for each in BACKENDS if name == "auto" else [name]:
        try:
            offer = probe(each)
            for options in _ways(each, offer, device, threads, precision, cache):
                size = max_batch or offer.devices[options.kind]
                options = replace(options, cuda_graphs=cuda_graphs, verify=verify)
                found.append(Backend(each, options, size, version=offer.version, traits=offer.traits))
        except EngineError as error:
            failures.append(str(error))
    if not found:
        raise EngineError("; ".join(failures))
    return [b for b in found if b.options.device == found[0].options.device]


def _ways(
    name: str, offer: Offer, device: str | None, threads: int | None, precision: str, cache: Path | None
) -> Iterator[SessionOptions]:
    """Return the options with which a backend may be used; EngineError if it lacks the requested ones."""
    options = SessionOptions(device or next(iter(offer.devices)), threads, cache=cache)
    if options.kind not in offer.devices:
        names = ", ".join(offer.devices)
        raise EngineError(f"{name} {offer.version} cannot use device {options.device!r} here, only {names}")
    if precision in ("graph", "auto"):
        yield options
        wanted = offer.precisions if precision == "auto" else ()
    elif precision in offer.precisions:
        wanted = (precision,)
    else:
        known = ", ".join(("graph", *offer.precisions))
        raise EngineError(f"{name} {offer.version} cannot compute in {precision} here, only as: {known}")
    for other in wanted:
        yield SessionOptions(options.device, threads, other, cache)
