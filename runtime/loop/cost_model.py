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

    def __init__(self, graphs: Mapping[str, Graph], known: Mapping[str, float] | None = None) -> None:
        """Start from the manifest, and from `known` seconds per tile by role, as earlier runs measured them.

        EngineError if a graph's multiply-accumulates are out of range.
        """
        self._known = {role: float(known[role]) for role in graphs if role in known} if known else {}
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

        A graph that has not run yet takes what it took in earlier runs. If that is not known either, it is
        assumed to do as many multiply-accumulates per second as the others; if nothing is known, FIRST_RATE
        is assumed.
        """
        per_tile = self.per_tile()
        return sum(count * per_tile[role] for role, count in tiles.items())

    def per_tile(self) -> dict[str, float]:
        """Return the estimated seconds per tile of all roles."""
        with self._lock:
            tiles, seconds = Counter(self._tiles), dict(self._seconds)
        figures = {role: seconds[role] / count for role, count in tiles.items() if count}
        if figures:
            macs = sum(self._macs[role] * tiles[role] for role in figures)
            rate = sum(seconds[role] for role in figures) / macs
        elif self._known:
            rate = sum(self._known.values()) / sum(self._macs[role] for role in self._known)
        else:
            rate = FIRST_RATE
        return {role: macs * rate for role, macs in self._macs.items()} | self._known | figures

    @property
    def grounded(self) -> bool:
        """True if the estimates rest on a measurement, of this process or of an earlier one."""
        with self._lock:
            return bool(self._known) or any(self._tiles.values())

    def measured(self) -> dict[str, float]:
        """Return the seconds per tile of the graphs that ran in this process, to be kept for later ones."""
        with self._lock:
            return {role: self._seconds[role] / count for role, count in self._tiles.items() if count}


def macs_of(role: str, graph: Graph) -> int:
    """Return the multiply-accumulates of one tile from the manifest; EngineError if they are out of range."""
    if not 0 <= graph.macs <= MAX_MACS:
        raise EngineError(
            f"graph {role!r}: the manifest gives a number of multiply-accumulates (macs) outside 0 to 1e18; "
            "export the engine again with moesr-export"
        )
    return graph.macs
