"""The page of results: tables of the loads, memory over time, and the answers to hostile requests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchlib.machine import load_average
from benchlib.tables import grid

from load_test import fairness
from load_test.fairness import Fairness
from load_test.loads import Load

HEADS = (
    *("load", "images", "images per s", "p50 (s)", "p95 (s)", "p99 (s)", "slots per tick"),
    *("refused (503)", "wrong"),
)
POINTS = 12  # rows of the table of memory


@dataclass
class Results:
    """All measurements so far."""

    engine: str
    steps: int
    origin: str  # command, commit and machine, as they were before a page was written
    sizes: Sequence[tuple[int, int]]  # heights and widths of the inputs
    fairness: Fairness
    loads: list[Load] = field(default_factory=list)
    memory: Sequence[tuple[float, float]] = ()  # seconds since the start, megabytes
    hostile: Mapping[str, Counter[str]] = field(default_factory=dict)
    finished: bool = False


def page(results: Results) -> str:
    """Format the measurements as Markdown."""
    sizes = ", ".join(f"{width}x{height}" for height, width in results.sizes)
    busy = load_average()
    parts = [
        "# The service under load",
        results.origin,
        *([] if results.finished else ["This run is not finished; the rows below are complete."]),
        f"Engine {results.engine}, {results.steps} steps, inputs of {sizes} pixels in turns. Every result is "
        'compared with the one of the same input sent alone; the column "wrong" counts differences. '
        "Latencies are the client's, from the start of the request to the whole result; in the load \"served "
        "one by one\" they include the wait for the client's turn."
        + (f" Load average of the machine at the end: {busy:.1f}." if busy is not None else ""),
        grid(HEADS, [_row(load) for load in results.loads]),
        *_by_size(results),
        *_comparison(results.loads),
        *fairness.lines(results.fairness),
        *_memory(results.memory),
        *_hostile(results.hostile),
    ]
    return "\n\n".join(parts) + "\n"


def _row(load: Load) -> list[str]:
    times = [_seconds(load.quantile(percent)) for percent in (50, 95, 99)]
    counts = str(load.refused), str(load.wrong)
    images = str(len(load.latencies))
    return [load.kind.name, images, f"{load.rate:.3f}", *times, f"{load.slots_per_tick:.2f}", *counts]


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _by_size(results: Results) -> list[str]:
    """Return the median and the 95th percentile of the latency for each input."""
    heads = ["p50 / p95 (s)", *(f"{width}x{height}" for height, width in results.sizes)]
    rows = [
        [
            load.kind.name,
            *(
                f"{_seconds(load.quantile(50, k))} / {_seconds(load.quantile(95, k))}"
                for k in range(len(results.sizes))
            ),
        ]
        for load in results.loads
    ]
    return ["## Latency by size of the input", grid(heads, rows)] if rows else []


def _comparison(loads: Sequence[Load]) -> list[str]:
    """Compare the throughput of each load with serving one by one, in one sentence each."""
    base = next((load for load in loads if load.kind.in_turns and load.rate), None)
    if base is None:
        return []
    lines = [
        f"- {load.kind.name}: {load.rate / base.rate:.2f} times the throughput, "
        f"{load.quantile(50) / base.quantile(50):.2f} times the median latency and "
        f"{load.quantile(95) / base.quantile(95):.2f} times the 95th percentile, at "
        f"{load.slots_per_tick:.2f} slots per tick."
        for load in loads
        if load is not base and load.latencies
    ]
    return [f'## Compared with "{base.kind.name}"', "\n".join(lines)]


def _memory(samples: Sequence[tuple[float, float]]) -> list[str]:
    """Return the largest resident memory of the server in each of several equal spans of time."""
    if not samples:
        return []
    stride = -(-len(samples) // POINTS)
    stretches = [samples[k : k + stride] for k in range(0, len(samples), stride)]
    cells = [[f"{part[-1][0] / 60:.1f}", f"{max(mb for _, mb in part):.0f}"] for part in stretches]
    heads = ["until minute", *(minute for minute, _ in cells)]
    return [
        "## Memory of the server over time",
        grid(heads, [["largest resident size (MB)", *(mb for _, mb in cells)]]),
    ]


def _hostile(answers: Mapping[str, Counter[str]]) -> list[str]:
    """Return the answers to each kind of hostile request and their numbers."""
    if not answers:
        return []
    rows = [
        [name, ", ".join(f"{answer} ({count})" for answer, count in sorted(found.items()))]
        for name, found in answers.items()
    ]
    return ["## Hostile requests during the load", grid(["request", "status (times)"], rows, names=2)]
