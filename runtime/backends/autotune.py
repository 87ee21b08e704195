"""Measuring which of several backends runs an engine fastest on this machine, and caching the result.

Each backend is timed on one run of the engine's first expert, with one tile; in an engine without experts, of
its decoder. A backend replaces a preferred one only if it is clearly faster and the results of both agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moesr.runtime.backends.selection import Backend
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import MoesrError
from moesr.runtime.system import cpu, json_dataclass, user_cache
from moesr.runtime.system.relative_error import relative_l2

RUNS, BUDGET_S = 9, 1.0
"""The number of timed runs after a warm-up run, and the time limit in seconds for all of them together.

The shortest run counts, since other programs disturbed it least. No further run is started after the time
limit, so a slow backend is measured by its first run.
"""

MARGIN = 0.9
"""A less preferred backend is chosen if its time is at most this share of the preferred backend's time."""

AGREEMENT = 1e-2
"""The largest relative L2 difference of a step's result from that of the preferred backend.

Float32 results differ by 1e-6 to 1e-4, because the orders of summation differ, and bfloat16 results by 4e-3
on the bundled engines. A larger difference means that a backend computes wrongly, or not precisely enough to
be chosen by default. If the export checked the graph against a wider bound, as for bf16 and int8, that bound
is used.
"""

FOLDER = "fastest"
"""The folder of the measurements in the cache directory."""

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class Measured:
    """A measurement: for each backend by its label, the seconds per step or the reason of its exclusion."""

    engine: str
    machine: str
    seconds: dict[str, float]
    refused: dict[str, str]
    chosen: str

    def __str__(self) -> str:
        parts = [f"{label} {1e3 * figure:.1f} ms" for label, figure in self.seconds.items()]
        parts += [f"not {label}: {why}" for label, why in self.refused.items()]
        return ", ".join(parts)


_measured: dict[str, Measured] = {}  # by file name, in case the cache directory cannot be written


def choose(found: Sequence[Backend], directory: Path, manifest: Manifest) -> tuple[Backend, Measured | None]:
    """Return the fastest of several backends for an engine and the measurement, and log the reason.

    The first backend and None are returned without a measurement if there is only one backend, or if the
    backends are on a GPU. They are also returned if no backend can run the expert; using it raises the error.
    """
    if found[0].options.kind != "cpu":
        found[0].announce("preferred on a GPU")
        return found[0], None
    if len(found) == 1:
        found[0].announce("the only one available")
        return found[0], None
    measured = _recall(found, manifest)
    if measured is None:
        log.info("measuring which backend is the fastest for this engine; this is done once")
        measured = _measure(found, directory, manifest)
        if measured is None:
            found[0].announce("no backend could be measured")
            return found[0], None
        _keep(found, manifest, measured)
    chosen = next(backend for backend in found if backend.label == measured.chosen)
    chosen.announce(f"a step takes {measured}")
    return chosen, measured


def cache_name(found: Sequence[Backend], manifest: Manifest) -> str:
    """Return the name of the measurement's cache file, a hash of all that the result depends on."""
    timed = manifest.graphs[manifest.main_role]
    facts = {
        "graphs": [file.sha256 for arrangement in timed.arrangements for file in arrangement.files],
        "backends": [(b.label, b.version, b.options.device, b.options.threads) for b in found],
        "machine": machine(),
        "rules": (RUNS, BUDGET_S, MARGIN, AGREEMENT),
    }
    return f"{FOLDER}/{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.json"


def machine() -> str:
    """Return the processor's model and the number of its logical cores that this process may use."""
    return f"{cpu.model()}, {cpu.cores()} logical cores"


def _recall(found: Sequence[Backend], manifest: Manifest) -> Measured | None:
    """Return an earlier measurement; None if it is absent or its chosen backend is not among those found."""
    name = cache_name(found, manifest)
    if name in _measured:
        return _measured[name]
    try:
        measured = json_dataclass.build(Measured, user_cache.read(name))
    except ValueError:
        return None
    return measured if measured.chosen in {backend.label for backend in found} else None


def _keep(found: Sequence[Backend], manifest: Manifest, measured: Measured) -> None:
    name = cache_name(found, manifest)
    _measured[name] = measured
    user_cache.write(name, dataclasses.asdict(measured))


def _measure(found: Sequence[Backend], directory: Path, manifest: Manifest) -> Measured | None:
    """Time a step on each backend in turn, so that only one graph at a time is in memory."""
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    reference: np.ndarray | None = None
    proof = manifest.graphs[manifest.main_role].parity
    limit = max(AGREEMENT, proof.threshold if proof else 0.0)
    for backend in found:
        try:
            taken, result = _time_step(backend, directory, manifest)
        except (MoesrError, MemoryError) as error:
            refused[backend.label] = str(error)
            continue
        reference = result if reference is None else reference
        difference = relative_l2(result, reference)
        if difference <= limit or not seconds:
            seconds[backend.label] = taken
        else:
            refused[backend.label] = f"differs by {difference:.1e}, more than {limit:.0e}"
    if not seconds:
        return None
    chosen = next(iter(seconds))
    for label, figure in seconds.items():
        if figure <= MARGIN * seconds[chosen]:
            chosen = label
    return Measured(manifest.name, machine(), seconds, refused, chosen)


def _time_step(backend: Backend, directory: Path, manifest: Manifest) -> tuple[float, np.ndarray]:
    """Return the seconds of one run of the main graph on one tile, and its result on seeded inputs.

    The session bypasses the cache of prepared graphs, because the backend may not be chosen.
    """
    backend = replace(backend, options=replace(backend.options, cache=None))
    device = backend.device()
    session = backend.open(directory, manifest.graphs[manifest.main_role])
    t = sum(manifest.expert_ranges[0]) // 2 if manifest.experts else 0
    try:
        rng, boundary = np.random.Generator(np.random.PCG64(0)), session.boundary
        buffers = {s.name: device.buffer(s, 1) for s in (*boundary.inputs, *boundary.outputs)}
        for spec in boundary.inputs:
            value = float(t if spec.name == "t" else 0)
            number = len(spec.dims) == 1
            buffers[spec.name][...] = value if number else rng.standard_normal(spec.shape(1))
        session.bind(buffers, 1)
        start = time.perf_counter()
        quickest = math.inf
        for _ in range(1 + RUNS):
            begin = time.perf_counter()
            session.enqueue(1)
            end = time.perf_counter()
            quickest = min(quickest, end - begin)
            if end - start > BUDGET_S:
                break
        return quickest, buffers[boundary.outputs[0].name].copy()
    finally:
        session.close()
        backend.release()
