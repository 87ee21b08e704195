"""Which graphs of an engine are in memory: loaded when first needed, the next one ahead of its use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from moesr.runtime.manifest import Graph
from moesr.runtime.sessions import Session


class Residency:
    """Sessions by graph. One caller at a time; loading runs in a thread of its own."""

    def __init__(self, open_graph: Callable[[Graph], Session], keep_all: bool) -> None:
        """`keep_all`: never drop a loaded graph; otherwise only the one in use and the next stay."""
        self._open = open_graph
        self._keep_all = keep_all
        self._loads: dict[str, Future[Session]] = {}  # by file; done or under way
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moesr-load")

    @property
    def loaded(self) -> frozenset[str]:
        """Files of the graphs in memory or on their way."""
        return frozenset(self._loads)

    def get(self, graph: Graph, upcoming: Graph | None) -> Session:
        """The session of `graph`, waiting for it where needed; begins to load `upcoming` meanwhile."""
        if not self._keep_all:
            keep = {graph.file} | ({upcoming.file} if upcoming else set())
            for file in self._loads.keys() - keep:
                del self._loads[file]
        self._request(graph)
        if upcoming:
            self._request(upcoming)
        try:
            return self._loads[graph.file].result()
        except BaseException:
            self._loads.pop(graph.file, None)  # so that another attempt is possible
            raise

    def _request(self, graph: Graph) -> None:
        if graph.file not in self._loads:
            self._loads[graph.file] = self._loader.submit(self._open, graph)

    def close(self) -> None:
        """Drop every session."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._loads.clear()
