"""What a tile of each graph costs: by multiply-accumulates, then by what this process has measured."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

from moesr.runtime.engine.graph_spec import Graph


class Costs:
    """Seconds a tile by role. Threads may share it."""

    def __init__(self, graphs: Mapping[str, Graph]) -> None:
        self._macs = {role: max(graph.macs, 1) for role, graph in graphs.items()}
        self._tiles: Counter[str] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys(graphs, 0.0)
        self._lock = threading.Lock()

    def observe(self, role: str, tiles: int, seconds: float) -> None:
        """Take note of a run of a graph."""
        with self._lock:
            self._tiles[role] += tiles
            self._seconds[role] += seconds

    def seconds(self, tiles: Mapping[str, int]) -> float:
        """Estimate for a number of tiles by role.

        A graph that has not run yet is taken to be as fast, a multiply-accumulate, as those that have; before
        any has run, at 1e11 a second.
        """
        with self._lock:
            measured = sum(self._macs[role] * count for role, count in self._tiles.items())
            rate = sum(self._seconds.values()) / measured if measured else 1e-11
            return sum(count * self._tile_seconds(role, rate) for role, count in tiles.items())

    def _tile_seconds(self, role: str, rate: float) -> float:
        ran = self._tiles[role]
        return self._seconds[role] / ran if ran else self._macs[role] * rate
