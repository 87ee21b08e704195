"""An engine that was opened: its manifest, the backend that runs it, and the parts that run its graphs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from moesr.runtime.backends import autotune, kept_costs
from moesr.runtime.backends.selection import Backend, candidates
from moesr.runtime.devices import current_gpu
from moesr.runtime.devices.interface import Session
from moesr.runtime.engine.locate import engine_directory
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.loop.admission import Admission
from moesr.runtime.loop.cost_model import Costs
from moesr.runtime.loop.graph_memory import GraphMemory
from moesr.runtime.loop.residency import Residency
from moesr.runtime.loop.worker import Worker
from moesr.runtime.system import user_cache

log = logging.getLogger("moesr")


class OpenedEngine:
    """An engine with its `backend`, and `worker`, `admission` and `costs` for the work on images.

    Graphs are loaded when they are first needed. The worker owns all memory; closing it releases everything.
    """

    def __init__(
        self,
        engine: Path | str | None,
        *,
        backend: str = "auto",
        device: str | None = None,
        threads: int | None = None,
        verify: bool = True,
        max_batch: int | None = None,
        precision: str = "graph",
        cache: Path | str | Literal[False] | None = None,
        cuda_graphs: bool = True,
        read: Callable[..., Manifest] = read_manifest,
    ) -> None:
        """Open an engine directory, or a bundled engine by its name; the options are those of `Upscaler`.

        `read` reads the manifest of the kind of engine that is wanted. Raises EngineError or UsageError.
        """
        self._remembers = cache is not False
        kept = user_cache.directory() if cache is None else Path(cache) if cache else None
        choose = partial(
            candidates,
            backend,
            device,
            threads,
            max_batch,
            cache=kept,
            cuda_graphs=cuda_graphs,
            verify=verify,
        )
        self.cache = kept or user_cache.directory()
        with contextlib.nullcontext() if device == "cpu" else current_gpu.kept():
            found = choose(precision=precision)
            self.directory = engine_directory(engine)
            self.manifest = read(self.directory, verify=verify)
            if (precision, self.manifest.precision) == ("graph", "bf16"):  # float32 gives the same results
                found = choose(precision="auto")
            log.info("engine %s in %s", self.manifest.name, self.manifest.precision)
            self.backend, self.measured = autotune.choose(found, self.directory, self.manifest)
            self.backend.warn(self.manifest.precision)
            self._open()

    @classmethod
    def with_backend(cls, directory: Path, manifest: Manifest, backend: Backend) -> OpenedEngine:
        """Open an engine with a backend that has been chosen; nothing is kept for later processes."""
        opened = cls.__new__(cls)
        opened._remembers, opened.cache, opened.measured = False, None, None
        opened.directory, opened.manifest, opened.backend = directory, manifest, backend
        opened._open()
        return opened

    def _open(self) -> None:
        """Make the parts that process images."""
        manifest, directory, backend = self.manifest, self.directory, self.backend
        device = backend.device(directory)
        self.costs = Costs(manifest.graphs, kept_costs.recall(backend, manifest))
        graphs = GraphMemory(
            manifest,
            directory,
            backend.target,
            backend.max_batch,
            shared=backend.shares_memory,
            at_once=backend.opens_at_once,
            gpu_bytes=device.free_bytes,
        )
        opener = partial(_open_graph, backend, directory, manifest, device.stream)
        residency = Residency(opener, graphs.keep_all)
        again = partial(_open_float32, backend, directory, manifest)
        self.worker = Worker(device, residency, self.costs, backend.max_batch, backend.release, again)
        self.admission = Admission(graphs, residency, self.worker.limit_batch)

    def keep_costs(self) -> None:
        """Keep the seconds per tile that were measured for later processes, unless there is no cache."""
        if self._remembers:
            kept_costs.keep(self.backend, self.manifest, self.costs.measured())


def _open_graph(
    backend: Backend, directory: Path, manifest: Manifest, stream: int | None, role: str
) -> Session:
    return backend.open(directory, manifest.graphs[role], stream)


def _open_float32(backend: Backend, directory: Path, manifest: Manifest, role: str) -> Session | None:
    return backend.open_float32(directory, manifest.graphs[role])
