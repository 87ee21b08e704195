"""One image on many workers: an Upscaler whose graphs run in actors.

Canvases, gather, blend and the sampler's step stay in this process; only the inputs and outputs of tiles are
sent, 0.2 MB per sampling step and tile against half a second of work at full width. Each actor runs the tiles
in the same groups as a local backend, so the result is the local one on equal processors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.backends.base import SessionOptions, Traits
from moesr.runtime.backends.selection import Backend
from moesr.runtime.cluster.engines import engine_on_this_node
from moesr.runtime.cluster.tile_pool import TilePool
from moesr.runtime.devices.host import HostDevice
from moesr.runtime.engine.graph_spec import Boundary, Graph
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.opened import OpenedEngine
from moesr.runtime.upscaler import Upscaler


class RemoteSession:
    """A `Session` of a graph that runs in the actors of a pool."""

    capturable = False

    def __init__(self, pool: TilePool, role: str, boundary: Boundary) -> None:
        self._pool, self._role, self._boundary = pool, role, boundary
        self._buffers: Mapping[str, np.ndarray] = {}

    @property
    def boundary(self) -> Boundary:
        """See `Session.boundary`."""
        return self._boundary

    def bind(self, buffers: Mapping[str, Any], max_batch: int) -> None:
        """See `Session.bind`."""
        self._buffers = buffers

    def enqueue(self, batch: int) -> None:
        """See `Session.enqueue`; it sends the tiles in parts to all actors, and waits for the last part."""
        size = self._pool.per_run
        ranges = [(start, min(start + size, batch)) for start in range(0, batch, size)]
        outputs = self._pool.run(self._role, [(self._inputs(*ends), ends[1] - ends[0]) for ends in ranges])
        for (start, end), arrays in zip(ranges, outputs, strict=True):
            for spec, values in zip(self._boundary.outputs, arrays, strict=True):
                self._buffers[spec.name][start:end] = values

    def _inputs(self, start: int, end: int) -> dict[str, np.ndarray]:
        """Return the inputs of some tiles of the batch."""
        return {
            spec.name: self._buffers[spec.name][start:end] if spec.per_tile else self._buffers[spec.name]
            for spec in self._boundary.inputs
        }

    def abort(self) -> None:
        """See `Session.abort`."""
        self._pool.abort()

    def close(self) -> None:
        """See `Session.close`; the pool outlives its sessions."""


@dataclass(frozen=True)
class RemoteBackend(Backend):
    """A backend whose sessions run in a pool; the device of canvases is the host."""

    pool: TilePool = field(kw_only=True)
    roles: Mapping[str, str] = field(kw_only=True)  # by the file of a graph

    def device(self, directory: Path | None = None) -> HostDevice:
        """See `Backend.device`."""
        return HostDevice()

    def open(self, directory: Path, graph: Graph, stream: int | None = None) -> RemoteSession:
        """See `Backend.open`."""
        return RemoteSession(self.pool, self.roles[graph.file], graph.boundary)

    def open_float32(self, directory: Path, graph: Graph) -> None:
        """See `Backend.open_float32`: tiles are not run again."""

    def release(self) -> None:
        """See `Backend.release`; it ends the actors."""
        self.pool.close()


class RemoteUpscaler(Upscaler):
    """An Upscaler for large images on a cluster of which this process is a driver."""

    def __init__(self, engine: str, pool: TilePool) -> None:
        """Use the actors of a pool, which have opened `engine`; the pool closes with this Upscaler."""
        self.pool, directory = pool, engine_on_this_node(engine)
        manifest = read_manifest(directory, verify=False)
        roles = {graph.file: role for role, graph in manifest.graphs.items()}
        backend = RemoteBackend(
            "ray", SessionOptions(), pool.capacity, traits=Traits(), pool=pool, roles=roles
        )
        self._use(OpenedEngine.with_backend(directory, manifest, backend))
