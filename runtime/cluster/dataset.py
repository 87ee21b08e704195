"""The dataset of a run: a listing in a stream, a pool of workers, and report rows."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesr.runtime.cluster.ledger import Counts, Ledger
from moesr.runtime.cluster.listing import Sources
from moesr.runtime.cluster.places import missing
from moesr.runtime.cluster.worker import Work, Worker
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import EngineError, MoesrError, UsageError
from moesr.runtime.loop.admission import image_bytes
from moesr.runtime.loop.graph_memory import GraphMemory
from moesr.runtime.loop.tile_layout import TileLayout

TYPICAL_SIDE = 1024
"""The memory of a worker is estimated for images with sides of this many pixels."""

AT_ONCE = 2
"""The number of images in work per worker: one is fetched, prepared or delivered during another's work."""

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class Resources:
    """The resources that Ray reserves per worker, and the number of workers; None means as many as fit."""

    cpus: float
    gpus: float
    memory_bytes: int
    workers: int | None

    @classmethod
    def of(cls, args: argparse.Namespace, manifest: Manifest, directory: Path) -> Resources:
        """Return the resources that the arguments ask for; the memory is estimated if it is not given."""
        cpus = args.cpus_per_worker if args.cpus_per_worker is not None else float(args.threads or 1)
        memory = int(args.memory_per_worker * 1e9) if args.memory_per_worker is not None else None
        return cls(cpus, args.gpus_per_worker or 0.0, memory or estimate(manifest, directory), args.workers)


def estimate(manifest: Manifest, directory: Path) -> int:
    """Return the bytes of a worker with all graphs open and AT_ONCE images of TYPICAL_SIDE, as on a CPU."""
    graphs = GraphMemory(manifest, directory, "cpu", 1)
    layout = TileLayout(manifest, TYPICAL_SIDE, TYPICAL_SIDE)
    return graphs.needed(graphs.pools[0], frozenset(), warm=False) + AT_ONCE * image_bytes(layout)


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Make this process a driver of the cluster at an address during a `with` block.

    UsageError without one.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise missing(error.name or "ray") from error
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its messages would go to the terminal
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here sends no statistics
        try:
            with _silent_libraries(), _own_signals():
                ray.init(
                    address or None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    include_dashboard=False if not address else None,
                )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(f"--ray {address}: no cluster answers there: {error}") from error
    try:
        yield
    finally:
        if own:
            ray.shutdown()


@contextlib.contextmanager
def _silent_libraries() -> Iterator[None]:
    """Drop what C++ code writes to stderr during a `with` block."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Restore this program's handlers of signals at the end of a `with` block: Ray replaces them."""
    main = threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGINT, signal.SIGTERM] if main else []
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ReportRows:
    """An iterator over the report rows of a run, in the order in which they are made."""

    def __init__(self, rows: Iterator[dict[str, Any]], ledger: Any) -> None:
        self._rows, self._ledger = rows, ledger
        self._counts: Counts | None = None  # set once the run is over

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for row in self._rows:
                self._ledger.end.remote(json.loads(row["line"])["input"])
                yield row
        except Exception as error:
            raise cause_of(error) from error

    def counts(self) -> Counts:
        """Return the progress of the listing."""
        import ray

        counts: Any = self._counts or ray.get(self._ledger.counts.remote())
        return counts

    def close(self) -> None:
        """Stop the workers."""
        import ray

        close = getattr(self._rows, "close", None)
        if close:
            close()
        self._counts = self.counts()
        ray.kill(self._ledger)


def report_rows(sources: Sources, work: Work, resources: Resources, worker: Any = Worker) -> ReportRows:
    """Start the run; its errors are raised by the iterator. Ray Data makes actors of the class `worker`."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from moesr.runtime.cluster.datasource import ListingSource

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a block, which is a task, is one row
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    ledger = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote()
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=resources.workers,
        initial_size=resources.workers,
        max_concurrent_calls_per_actor=AT_ONCE,
        enable_true_multi_threading=True,
    )
    made = ray.data.read_datasource(ListingSource(sources, ledger), num_cpus=0).map(
        worker,
        fn_constructor_args=(work, ledger),
        compute=pool,
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        memory=resources.memory_bytes,
    )
    return ReportRows(iter(made.iter_rows()), ledger)


def cause_of(error: BaseException) -> BaseException:
    """Return the error of ours inside an exception of Ray, or an error with Ray's message."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MoesrError):
            return type(seen)(str(seen.args[0]) if seen.args else str(seen))
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    text = str(error).strip().splitlines()
    return EngineError(
        f"the cluster has stopped: {text[-1] if text else type(error).__name__}; run again to continue"
    )
