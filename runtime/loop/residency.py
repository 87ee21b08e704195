"""The graphs of an engine in memory: each is loaded when first needed, and the next one ahead of its use."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from moesr.runtime.devices.interface import Session

THREAD_PREFIX = "moesr-loop-"
"""The names of all threads that an Upscaler starts begin with this."""


class Residency:
    """Sessions by role. One thread at a time may ask for them; loading runs in its own thread."""

    def __init__(self, open_graph: Callable[[str], Session], keep_all: bool) -> None:
        """Start empty.

        With `keep_all` no loaded graph is dropped, else only the current and the next one stay.
        """
        self._open = open_graph
        self._keep_all = keep_all
        self._loads: dict[str, Future[Session]] = {}  # by role; complete or in progress
        self._load_s: dict[str, float] = {}  # duration of the last load, by role
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{THREAD_PREFIX}load")

    @property
    def loaded(self) -> frozenset[str]:
        """Roles of the graphs in memory or being loaded."""
        return frozenset(self._loads)

    def reload_s(self, role: str) -> float:
        """Return the expected seconds for loading a role.

        0 if it is in memory or no other graph is dropped for it.
        """
        if self._keep_all or role in self._loads:
            return 0.0
        return self._load_s.get(role, max(self._load_s.values(), default=0.0))

    def get(self, role: str, upcoming: str | None) -> Session:
        """Return the session of a role, waiting for it if needed, and begin to load `upcoming` meanwhile.

        Loading ahead may fail if there is no memory beside the previous graph. Then the graph is loaded again
        on its own. Raises the error of the second attempt.
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
            self._drop({role})  # so that the load can be tried again
            raise

    def _request(self, role: str) -> None:
        if role not in self._loads:
            self._loads[role] = self._loader.submit(self._load, role)

    def _load(self, role: str) -> Session:
        start = time.perf_counter()
        session = self._open(role)
        self._load_s[role] = time.perf_counter() - start
        return session

    def _drop(self, roles: set[str]) -> None:
        for role in roles:
            load = self._loads.pop(role)
            load.add_done_callback(_close)

    def close(self) -> None:
        """Drop every session."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._drop(set(self._loads))


def _close(load: Future[Session]) -> None:
    """Close the session of a completed load, if the load succeeded."""
    if not load.cancelled() and not load.exception():
        load.result().close()
