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

from moesr.runtime.cluster import ledger
from moesr.runtime.cluster.ledger import Counts
from moesr.runtime.cluster.listing import Sources
from moesr.runtime.cluster.places import missing
from moesr.runtime.cluster.worker import Work, Worker
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import MoesrError, UsageError
from moesr.runtime.loop.admission import image_bytes
from moesr.runtime.loop.graph_memory import GraphMemory
from moesr.runtime.loop.tile_layout import TileLayout

TYPICAL_SIDE = 1024
"""The memory of a worker is estimated for images with sides of this many pixels."""

AT_ONCE = 2
"""The number of images in work per worker: one is fetched, prepared or delivered during another's work."""

INIT_DEATHS = 100
"""Consecutive workers that may end before they are ready; the ledger counts those that open the engine."""

ANSWER_S = 10.0
"""The driver waits this long for the ledger, and otherwise shows the progress that it knows."""

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

    UsageError if no cluster answers there; MoesrError for an error of Ray in the block.
    """
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
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
        except Exception as error:  # Ray raises errors of any kind
            raise UsageError(f"--ray {address}: no cluster answers there: {error}") from error
    try:
        yield
    except RayError as error:
        raise cause_of(error) from error
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

    def __init__(self, rows: Iterator[dict[str, Any]], actor: Any) -> None:
        self._rows, self._ledger = rows, actor
        self._counts, self._over = Counts(), False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for row in self._rows:
                self._ledger.end.remote(json.loads(row["line"])["input"])
                yield row
        except Exception as error:
            raise cause_of(error) from error

    def counts(self) -> Counts:
        """Return the progress of the listing, as far as it is known while the ledger is out of reach."""
        import ray
        from ray.exceptions import RayError

        if not self._over:
            with contextlib.suppress(RayError):
                found: Any = ray.get(self._ledger.counts.remote(), timeout=ANSWER_S)
                self._counts = self._counts.and_later(found)
        return self._counts

    def close(self) -> None:
        """Stop the workers. Errors of Ray are dropped, as those of the run itself have been raised."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            close = getattr(self._rows, "close", None)
            if close:
                close()
        self.counts()
        self._over = True
        with contextlib.suppress(RayError):
            ray.kill(self._ledger)


def report_rows(sources: Sources, work: Work, resources: Resources, worker: Any = Worker) -> ReportRows:
    """Start the run; its errors are raised by the iterator. Ray Data makes actors of the class `worker`."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    from moesr.runtime.cluster.datasource import ListingSource

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a block, which is a task, is one row
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    actor = ledger.start()
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=resources.workers,
        initial_size=resources.workers,
        max_concurrent_calls_per_actor=AT_ONCE,
        enable_true_multi_threading=True,
    )
    made = ray.data.read_datasource(ListingSource(sources, actor), num_cpus=0).map(
        worker,
        fn_constructor_args=(work, actor),
        compute=pool,
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        memory=resources.memory_bytes,
    )
    return ReportRows(iter(made.iter_rows()), actor)


def cause_of(error: BaseException) -> BaseException:
    """Return the error of ours inside an exception of Ray, or an error with Ray's message."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MoesrError):
            return type(seen)(str(seen.args[0]) if seen.args else str(seen))
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    text = str(error).strip().splitlines()
    return MoesrError(
        f"the cluster has stopped: {text[-1] if text else type(error).__name__}; run again to continue"
    )
