"""Which graphs of an engine are in memory: loaded when first needed, the next one ahead of its use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from moesr.runtime.devices.interface import Session


class Residency:
    """Sessions by role. One thread at a time asks; loading runs in a thread of its own."""

    def __init__(self, open_graph: Callable[[str], Session], keep_all: bool) -> None:
        """`keep_all`: never drop a loaded graph; otherwise only the one in use and the next stay."""
        self._open = open_graph
        self._keep_all = keep_all
        self._loads: dict[str, Future[Session]] = {}  # by role; done or under way
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moesr-load")

    @property
    def loaded(self) -> frozenset[str]:
        """Roles of the graphs in memory or on their way."""
        return frozenset(self._loads)

    def get(self, role: str, upcoming: str | None) -> Session:
        """The session of a role, waiting for it where needed; begins to load `upcoming` meanwhile.

        Loading ahead may fail for want of the memory that the graph before it held: then the graph is loaded
        once more on its own. Raises what the second attempt raised.
        """
        ahead = role in self._loads
        if not self._keep_all:
            self._drop(self._loads.keys() - {role, upcoming})
        self._request(role)
        if upcoming:
            self._request(upcoming)
        try:
            return self._loads[role].result()
        except Exception:
            self._drop({role} if self._keep_all else set(self._loads))
            if not ahead:
                raise
        self._request(role)
        try:
            return self._loads[role].result()
        except BaseException:
            self._drop({role})  # so that another attempt is possible
            raise

    def _request(self, role: str) -> None:
        if role not in self._loads:
            self._loads[role] = self._loader.submit(self._open, role)

    def _drop(self, roles: set[str]) -> None:
        for role in roles:
            load = self._loads.pop(role)
            load.add_done_callback(_close)

    def close(self) -> None:
        """Drop every session."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._drop(set(self._loads))


def _close(load: Future[Session]) -> None:
    """Close the session of a load that has come to its end, if it came to one."""
    if not load.cancelled() and not load.exception():
        load.result().close()
