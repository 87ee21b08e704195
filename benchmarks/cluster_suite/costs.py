"""Measurements on a cluster of this machine: listing, rows through the driver, restarts, bytes, tiles."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchlib.local_store import s3_server, store_variables

from moesr.runtime.cli.outputs import Naming
from moesr.runtime.cli.report import Entry
from moesr.runtime.cluster import dataset
from moesr.runtime.cluster.dataset import Resources
from moesr.runtime.cluster.listing import Row, Sources
from moesr.runtime.cluster.tile_pool import TilePool
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.upscaler import Upscaler

SETTINGS = {"steps": 50, "sampler": "ddpm", "seed": 42, "fidelity": 1.0, "color_fix": "adain"}


@contextmanager
def cluster(cpus: int) -> Iterator[None]:
    """Start a cluster of one node, whose sockets lie in a directory with a short path."""
    import ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    os.environ |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    store = {"object_store_memory": 100 << 20, "include_dashboard": False}
    ray.init(num_cpus=cpus, log_to_driver=False, logging_level=logging.ERROR, **store)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def keys_per_s(count: int) -> float:
    """Return the rate at which a bucket of `count` keys is listed, with names of results."""
    with tempfile.TemporaryDirectory(prefix="moesr-") as folder:
        (Path(folder) / "bucket").mkdir()
        for number in range(count):
            (Path(folder) / f"bucket/{number:08d}.png").touch()
        with s3_server(Path(folder)) as address:
            os.environ |= store_variables(address)
            start = time.perf_counter()
            listed = sum(1 for _ in Sources(("s3://bucket",), Naming("_x4")).rows())
            seconds = time.perf_counter() - start
    assert listed == count
    return count / seconds


@dataclass(frozen=True)
class Numbers:
    """A listing of `count` inputs that do not exist."""

    count: int

    def rows(self) -> Iterator[Row]:
        """See `Sources.rows`."""
        return (Row("/", f"{k}.png", 0.0, f"{k}_x4.png", True) for k in range(self.count))


class Instant:
    """A worker that computes nothing."""

    def __init__(self, work: Any, ledger: Any) -> None:
        self._engine, self._ledger = Upscaler(work, threads=1) if work else None, ledger

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """See `Worker.__call__`; it makes the same call to the ledger."""
        import ray

        ray.get(self._ledger.begin.remote(row["key"], secrets.token_hex(8)))
        if self._engine:
            time.sleep(0.2)
        line = Entry(row["key"]).line("done", Provenance(4, "engine", SETTINGS))
        return {"line": json.dumps(line | {"pid": os.getpid()}), "code": 0, "note": ""}


def row_costs(count: int, workers: int) -> tuple[float, float]:
    """Return the rows per second of workers that compute nothing, and the driver's CPU seconds per row."""
    rows = _rows(count, None, workers)
    next(rows)
    start, busy = time.perf_counter(), time.process_time()
    seen = sum(1 for _ in rows)
    return seen / (time.perf_counter() - start), (time.process_time() - busy) / seen


def restart_s(engine: str) -> float:
    """Return the seconds from the death of the only worker to the first row of the next one.

    The next worker opens the engine first.
    """
    rows, gaps = _rows(24, engine, 1), []
    pid = json.loads(next(rows)["line"])["pid"]
    killed = time.perf_counter()
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    for row in rows:
        if json.loads(row["line"])["pid"] != pid:
            gaps.append(time.perf_counter() - killed - 0.5)
    return gaps[0]


def _rows(count: int, engine: Any, workers: int) -> Iterator[dict[str, Any]]:
    sources: Any = Numbers(count)
    rows = dataset.report_rows(sources, engine, Resources(1.0, 0.0, 1, workers), Instant)
    yield from rows
    rows.close()


def line_bytes() -> int:
    """Return the bytes of one line of the log, with names of 60 characters."""
    entry = Entry("s3://photographs-of-the-archive/2024/07/31/IMG_20240731.jpg")
    entry.result = "s3://results-of-the-archive/2024/07/31/IMG_20240731_x4.png"
    return len(json.dumps(entry.line("done", Provenance(4, "moesr-x4 fp32 0123abcd", SETTINGS)))) + 1


@dataclass(frozen=True)
class Tiles:
    """The cost of one step of the sampler on a set of tiles."""

    workers: int
    seconds: float
    runs: int
    bytes: int


def tiles(engine: str, count: int) -> tuple[list[Tiles], bool]:
    """Time an expert on `count` tiles, on one and on two workers of one core each.

    Also returns whether the two results are equal to the bit.
    """
    manifest = read_manifest(Path(engine), verify=False)
    role, rng = manifest.experts[0].graph, np.random.default_rng(0)
    specs = manifest.graphs[role].inputs
    parts = [
        ({s.name: np.asarray(rng.standard_normal(s.shape(1)), s.dtype) for s in specs}, 1)
        for _ in range(count)
    ]
    options = {"name": "onnxruntime", "device": "cpu", "threads": 1}
    found, results = [], []
    for workers in (1, 2):
        pool = TilePool(str(engine), options, workers, {"num_cpus": 1})
        pool.run(role, parts[: 2 * workers])  # opens the graph
        while len(pool.ran) < workers:
            pool.run(role, parts[: 2 * workers])
        _put_first(b"ray::TileRunner")
        runs, sent, start = pool.runs, pool.sent_bytes, time.perf_counter()
        results.append(pool.run(role, parts))
        seconds = time.perf_counter() - start
        found.append(Tiles(workers, seconds, pool.runs - runs, pool.sent_bytes - sent))
        pool.close()
    pairs = [pair for one, two in zip(*results, strict=True) for pair in zip(one, two, strict=True)]
    return found, all(np.array_equal(a, b) for a, b in pairs)


def _put_first(title: bytes) -> None:
    """Give the processes of this title priority over other sessions, which root may do on Linux.

    Without that, a busy machine gives two workers the time of one.
    """
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if title in (entry / "cmdline").read_bytes():
                (entry / "autogroup").write_text("-15")
