"""Common parts of the backends: offers, options of a session, checks of a graph, sessions on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesr.runtime.devices.driver import Block, Driver
from moesr.runtime.engine.graph_spec import Boundary, File, TensorSpec
from moesr.runtime.errors import EngineError


@dataclass(frozen=True)
class Traits:
    """Properties of a backend that the runtime has to consider and that are the same on all machines."""

    plain_graphs: bool = False  # on a CPU it gets plain convolutions, as its own are fast
    runs_parts: bool = False  # on a GPU it runs graphs in parts, with our kernels between the parts
    memory_per_session: bool = False  # each of its sessions has its own working memory
    maps_prepared: bool = False  # on a CPU it maps prepared graphs from a file, so that they open at once


@dataclass(frozen=True)
class Offer:
    """The devices and precisions that the library of a backend provides on this machine."""

    version: str
    devices: Mapping[str, int]  # the best number of tiles per run of each device, the fastest device first
    precisions: tuple[str, ...] = ()  # for `SessionOptions.precision`, besides the graph's own
    traits: Traits = Traits()


@dataclass(frozen=True)
class SessionOptions:
    """The options with which a backend opens a graph."""

    device: str = "cpu"  # "cpu", "cuda" or "cuda:N"
    threads: int | None = None  # None: chosen by the library
    precision: str | None = None  # precision of the arithmetic; None: that of the graph
    cache: Path | None = None  # directory for compiled or prepared graphs; None: nothing is cached
    verify: bool = True  # compare the checksums of cached files
    float32: bool = False  # every value is float32, whatever the graph says; for CPUs
    files: tuple[File, ...] = ()  # the files of the graph, from which names in the cache are derived
    max_batch: int = 1  # largest number of tiles in one run
    stream: int | None = None  # handle of the device's stream
    cuda_graphs: bool = True  # runs may be captured as CUDA graphs

    @property
    def kind(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]

    @property
    def index(self) -> int:
        """The device's number, 0 if none is given."""
        return int(self.device.partition(":")[2] or 0)


class GpuSession:
    """Base class of sessions on a GPU, with the life cycle of `Session`: `bind`, `enqueue` and `close`.

    A subclass implements `_bind`, `_enqueue` and `_release`. Device memory that it allocates with `_take` is
    freed when the session is bound again or closed, after all enqueued work is done.
    """

    capturable = True

    def __init__(self, path: Path, boundary: Boundary) -> None:
        """Make an unbound session; `path` is the graph's file, which error messages name."""
        self._path, self._boundary = path, boundary
        self._driver: Driver | None = None  # set while the session is bound
        self._blocks: list[Block] = []
        self._aborted = False

    @property
    def boundary(self) -> Boundary:
        """See `Session.boundary`."""
        return self._boundary

    def bind(self, buffers: Mapping[str, Any], max_batch: int) -> None:
        """See `Session.bind`; runs go to the stream of the buffers' device."""
        self._unbind()
        self._driver = driver = buffers[self._boundary.outputs[0].name].driver
        self._bind(driver, buffers, max_batch)

    def enqueue(self, batch: int) -> None:
        """See `Session.enqueue`; returns before the run is done."""
        if self._aborted or self._driver is None:
            raise EngineError(f"{self._path.name}: its session was aborted or closed; open the engine again")
        self._enqueue(self._driver, batch)

    def abort(self) -> None:
        """See `Session.abort`; a run that is already enqueued ends by itself within milliseconds."""
        self._aborted = True

    def close(self) -> None:
        """See `Session.close`; waits for all enqueued work. Closing a closed session does nothing."""
        self._unbind()
        self._release()

    def _bind(self, driver: Driver, buffers: Mapping[str, Any], max_batch: int) -> None:
        """Prepare runs of 1 to `max_batch` tiles between these buffers."""
        raise NotImplementedError

    def _enqueue(self, driver: Driver, batch: int) -> None:
        """Add a run on `batch` tiles to the driver's stream."""
        raise NotImplementedError

    def _release(self) -> None:
        """Drop the objects of the library; no work is outstanding, and a second call must do nothing."""
        raise NotImplementedError

    def _take(self, driver: Driver, nbytes: int) -> Block:
        """Allocate device memory that the session keeps until it is bound again or closed."""
        self._blocks.append(driver.alloc(max(nbytes, 1)))
        return self._blocks[-1]

    def _unbind(self) -> None:
        """Wait for all enqueued work, then free the memory that the session has taken."""
        if self._driver:
            self._driver.synchronize()
            while self._blocks:
                self._driver.free(self._blocks.pop())
        self._driver = None


def check_boundary(path: Path, found: Boundary, declared: Boundary) -> None:
    """Raise EngineError if a file's boundary is not the declared one.

    It may lack inputs other than the first.
    """
    wanted = {spec.name: spec for spec in declared.inputs}
    first = declared.inputs[0].name
    known = all(spec.name in wanted and _agree(spec, wanted[spec.name]) for spec in found.inputs)
    outputs = len(found.outputs) == len(declared.outputs) and all(
        a.name == b.name and _agree(a, b) for a, b in zip(found.outputs, declared.outputs, strict=True)
    )
    if not (known and outputs and first in {spec.name for spec in found.inputs}):
        raise EngineError(f"{path}: is {found}, expected {declared}; export the engine again")


def _agree(found: TensorSpec, declared: TensorSpec) -> bool:
    """Return True if types and dimensions are equal; a dimension that the file leaves open fits any."""
    if found.dtype != declared.dtype or len(found.dims) != len(declared.dims):
        return False
    pairs = zip(found.dims, declared.dims, strict=True)
    return all(isinstance(f, str) or f == d for f, d in pairs)
