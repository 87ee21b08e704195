"""Runs tiles once more in float32 if a graph gave NaN or infinity for them.

Half precision overflows above 65504, and 8-bit ranges do not fit every image. On the host, every run of a
graph is checked before its output is blended, and only the tiles at fault run again, in a float32 form of the
graph: the engine's own float32 variant, or one that is derived from the graph when it opens. A tile whose
second run fails too, or whose graph is float32 already, is left as it is, and its image fails.

The second run takes one tile at a time, so a result does not depend on the tiles that shared the first run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moesr.runtime.devices.interface import Device, Session
from moesr.runtime.engine.graph_spec import Boundary
from moesr.runtime.errors import EngineError, MemoryLimitError

Opener = Callable[[str], "Session | None"]
"""Opens the float32 form of a role's graph; None if the graph that is open computes in float32 already."""

LARGEST = 1e30
"""Larger values count as infinite. OpenVINO makes the largest float32 number of an infinite 8-bit range."""

log = logging.getLogger("moesr")


class Float32Retry:
    """Float32 sessions of an engine's graphs, opened when they are needed. The worker's thread uses it.

    Only the session that was used last is kept, since all steps of an expert follow one another.
    """

    def __init__(self, device: Device, opener: Opener = lambda role: None) -> None:
        self._device, self._open = device, opener
        self._role: str | None = None
        self._session: Session | None = None
        self._buffers: dict[str, Any] = {}

    def run(self, role: str, boundary: Boundary, buffers: Mapping[str, Any], tile: int) -> bool:
        """Run one tile of `buffers` in float32 and replace its outputs there; False if it cannot be repaired.

        The device must be the host.
        """
        try:
            session = self._opened(role, boundary)
        except (EngineError, MemoryLimitError) as error:
            log.warning("%s cannot be opened in float32: %s", role, error)
            return False
        if session is None:
            return False
        for spec in session.boundary.inputs:
            given = buffers[spec.name]
            self._buffers[spec.name][...] = given[tile : tile + 1] if spec.per_tile else given
        session.enqueue(1)
        if not finite(boundary, self._buffers, 0):
            return False
        for spec in boundary.outputs:
            buffers[spec.name][tile] = self._buffers[spec.name][0]
        return True

    def _opened(self, role: str, boundary: Boundary) -> Session | None:
        if self._role != role:
            self.close()
            session = self._open(role)
            if session:
                specs = (*boundary.inputs, *boundary.outputs)
                self._buffers = {spec.name: self._device.buffer(spec, 1) for spec in specs}
                session.bind(self._buffers, 1)
            self._role, self._session = role, session
        return self._session

    def close(self) -> None:
        """Release the session and its buffers."""
        if self._session:
            self._session.close()
        self._role, self._session, self._buffers = None, None, {}


class CheckedSession:
    """A session on the host whose outputs are checked after every run, and repaired by a `Float32Retry`.

    `repaired` holds the positions of the tiles of the last run that ran again with success.
    """

    capturable = False

    def __init__(self, session: Session, role: str, buffers: Mapping[str, Any], retry: Float32Retry) -> None:
        self._session, self._role, self._buffers, self._retry = session, role, buffers, retry
        self.boundary = session.boundary
        self.repaired: list[int] = []

    def enqueue(self, batch: int) -> None:
        """See `Session.enqueue`."""
        self._session.enqueue(batch)
        boundary, buffers = self.boundary, self._buffers
        bad = [tile for tile in range(batch) if not finite(boundary, buffers, tile)]
        self.repaired = [tile for tile in bad if self._retry.run(self._role, boundary, buffers, tile)]
        for tile in set(bad) - set(self.repaired):
            buffers[boundary.outputs[0].name][tile] = np.nan  # so that its image fails

    def bind(self, buffers: Mapping[str, Any], max_batch: int) -> None:
        """See `Session.bind`."""
        self._session.bind(buffers, max_batch)

    def abort(self) -> None:
        """See `Session.abort`."""
        self._session.abort()

    def close(self) -> None:
        """See `Session.close`."""
        self._session.close()


def finite(boundary: Boundary, buffers: Mapping[str, np.ndarray], tile: int) -> bool:
    """Whether all outputs of one tile are numbers below LARGEST. NaN fails both comparisons."""
    outputs = (buffers[spec.name][tile] for spec in boundary.outputs)
    return all(bool(output.min() > -LARGEST and output.max() < LARGEST) for output in outputs)
