"""Estimates of the seconds per tile of each graph, first from its work, then from measurements."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

from moesr.runtime.engine.graph_spec import Graph
from moesr.runtime.errors import EngineError

MAX_MACS = 10**18
"""A larger number of multiply-accumulates per tile is refused; StableSR's decoder has 4e12."""

FIRST_RATE = 1e-11
"""The seconds per multiply-accumulate that are assumed before anything has run."""


class Costs:
    """Seconds per tile by role. Threads may share it."""

    def __init__(self, graphs: Mapping[str, Graph]) -> None:
        """Start from the manifest; EngineError if a graph's multiply-accumulates are out of range."""
        self._macs = {role: max(macs_of(role, graph), 1) for role, graph in graphs.items()}
        self._tiles: Counter[str] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys(graphs, 0.0)
        self._lock = threading.Lock()

    def observe(self, role: str, tiles: int, seconds: float) -> None:
        """Record a run of a graph."""
        with self._lock:
            self._tiles[role] += tiles
            self._seconds[role] += seconds

    def observe_together(self, tiles: Mapping[str, int], seconds: float) -> None:
        """Record runs of several graphs that took `seconds` in all, in proportion to the estimates so far."""
        per_tile = self.per_tile()
        estimate = sum(count * per_tile[role] for role, count in tiles.items())
        for role, count in tiles.items():
            if estimate > 0.0:
                self.observe(role, count, seconds * count * per_tile[role] / estimate)

    def seconds(self, tiles: Mapping[str, int]) -> float:
        """Return an estimate for a number of tiles by role.

        A graph that has not run yet is assumed to do as many multiply-accumulates per second as those that
        have run; before any graph has run, FIRST_RATE is assumed.
        """
        per_tile = self.per_tile()
        return sum(count * per_tile[role] for role, count in tiles.items())

    def per_tile(self) -> dict[str, float]:
        """Return the estimated seconds per tile of all roles."""
        with self._lock:
            measured = sum(self._macs[role] * count for role, count in self._tiles.items())
            rate = sum(self._seconds.values()) / measured if measured else FIRST_RATE
            return {
                role: self._seconds[role] / self._tiles[role] if self._tiles[role] else macs * rate
                for role, macs in self._macs.items()
            }


def macs_of(role: str, graph: Graph) -> int:
    """Return the multiply-accumulates of one tile from the manifest; EngineError if they are out of range."""
    if not 0 <= graph.macs <= MAX_MACS:
        raise EngineError(
            f"graph {role!r}: the manifest gives a number of multiply-accumulates (macs) outside 0 to 1e18; "
            "export the engine again with moesr-export"
        )
    return graph.macs
