"""Sessions: one graph of an engine on one backend, running between buffers of a device.

A backend is a module of this package: its `probe` says what it offers, its `open_session` opens a graph.
`moesr.runtime.backends.selection` chooses among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime.engine.graph_spec import Boundary, File, TensorSpec
from moesr.runtime.errors import EngineError


@dataclass(frozen=True)
class Offer:
    """What a backend's library provides on this machine."""

    version: str
    devices: Mapping[str, int]  # the fastest first, each with the tiles it best runs at once
    precisions: tuple[str, ...] = ()  # of `Options.precision`, beside the graph's own


@dataclass(frozen=True)
class SessionOptions:
    """How a session is to run its graph."""

    device: str = "cpu"  # "cpu", "cuda" or "cuda:N"
    threads: int | None = None  # None: the library's own choice
    precision: str | None = None  # of the arithmetic, where a backend can change it; None: as the graph says
    cache: Path | None = None  # directory for what a backend compiles; None: nothing is kept
    verify: bool = True  # whether the checksums of what was kept are compared
    files: tuple[File, ...] = ()  # of the graph, beside each other, for what is kept of it
    max_batch: int = 1  # tiles in one run at most
    stream: int | None = None  # of the device, for sessions that enqueue on it
    cuda_graphs: bool = True  # whether a GPU may be given a whole run at once

    @property
    def kind(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]

    @property
    def index(self) -> int:
        """The device's number, 0 where there is none."""
        return int(self.device.partition(":")[2] or 0)


def check_boundary(path: Path, found: Boundary, declared: Boundary) -> None:
    """EngineError where a file is not what the manifest declares; an input that it lacks is not missed."""
    wanted = {spec.name: spec for spec in declared.inputs}
    first = declared.inputs[0].name
    known = all(spec.name in wanted and _agree(spec, wanted[spec.name]) for spec in found.inputs)
    outputs = len(found.outputs) == len(declared.outputs) and all(
        a.name == b.name and _agree(a, b) for a, b in zip(found.outputs, declared.outputs, strict=True)
    )
    if not (known and outputs and first in {spec.name for spec in found.inputs}):
        raise EngineError(f"{path}: is {found}, expected {declared}; export the engine again")


def _agree(found: TensorSpec, declared: TensorSpec) -> bool:
    """Equal in type and dimensions, where a dimension that the file leaves open fits any."""
    if found.dtype != declared.dtype or len(found.dims) != len(declared.dims):
        return False
    pairs = zip(found.dims, declared.dims, strict=True)
    return all(isinstance(f, str) or f == d for f, d in pairs)
