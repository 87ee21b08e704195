"""The parts that all backends share: their offer, the options of a session, and checks of a graph.

A backend is a module of this package. Its `probe` returns what it offers on this machine, and its
`open_session` opens one graph of an engine. `moesr.runtime.backends.selection` chooses among the backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime.engine.graph_spec import Boundary, File, TensorSpec
from moesr.runtime.errors import EngineError


@dataclass(frozen=True)
class Traits:
    """How the runtime has to treat a backend, whatever the machine."""

    plain_graphs: bool = False  # it has fast convolutions of its own, so it is given plain ones on a CPU
    runs_parts: bool = False  # on a GPU it runs graphs in parts, with our kernels between them
    memory_per_session: bool = False  # each of its sessions has working memory of its own
    maps_prepared: bool = False  # on a CPU it maps prepared graphs from a file, so that they open at once


@dataclass(frozen=True)
class Offer:
    """The devices and precisions that a backend's library provides on this machine."""

    version: str
    devices: Mapping[str, int]  # the fastest first, each with the best number of tiles per run
    precisions: tuple[str, ...] = ()  # of `SessionOptions.precision`, in addition to the graph's own
    traits: Traits = Traits()


@dataclass(frozen=True)
class SessionOptions:
    """How a session runs its graph."""

    device: str = "cpu"  # "cpu", "cuda" or "cuda:N"
    threads: int | None = None  # None: the library chooses
    precision: str | None = None  # of the arithmetic; None: that of the graph
    cache: Path | None = None  # directory for what a backend compiles; None: nothing is kept
    verify: bool = True  # whether the checksums of what was kept are compared
    files: tuple[File, ...] = ()  # the files of the graph, for what is kept of it
    max_batch: int = 1  # most tiles in one run
    stream: int | None = None  # handle of the device's stream
    cuda_graphs: bool = True  # whether runs may be captured as CUDA graphs

    @property
    def kind(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]

    @property
    def index(self) -> int:
        """The device's number, 0 if none is given."""
        return int(self.device.partition(":")[2] or 0)


def check_boundary(path: Path, found: Boundary, declared: Boundary) -> None:
    """EngineError if a file is not what the manifest declares; it may lack inputs other than the first."""
    wanted = {spec.name: spec for spec in declared.inputs}
    first = declared.inputs[0].name
    known = all(spec.name in wanted and _agree(spec, wanted[spec.name]) for spec in found.inputs)
    outputs = len(found.outputs) == len(declared.outputs) and all(
        a.name == b.name and _agree(a, b) for a, b in zip(found.outputs, declared.outputs, strict=True)
    )
    if not (known and outputs and first in {spec.name for spec in found.inputs}):
        raise EngineError(f"{path}: is {found}, expected {declared}; export the engine again")


def _agree(found: TensorSpec, declared: TensorSpec) -> bool:
    """True if types and dimensions are equal; a dimension that the file leaves open fits any."""
    if found.dtype != declared.dtype or len(found.dims) != len(declared.dims):
        return False
    pairs = zip(found.dims, declared.dims, strict=True)
    return all(isinstance(f, str) or f == d for f, d in pairs)
