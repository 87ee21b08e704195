"""Values on their way to a GPU: pinned memory that the host fills while earlier copies are still waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from moesr.runtime.devices.driver import Driver

_ALIGNMENT = 16
_PIECES = 4  # of a ring that a large array is cut into, so that filling and copying overlap


class Staging:
    """A ring of pinned bytes. A byte is filled again only when the device has read it."""

    def __init__(self, driver: Driver, nbytes: int, ahead: int | None = None) -> None:
        """`ahead`: sendings by which the host may be ahead of the device before it waits."""
        self._driver, self._ring, self._ahead = driver, driver.pinned(nbytes), ahead
        self._held: deque[tuple[int, Any]] = deque()  # where a sending began, and the event that ends it
        self._at = 0  # counted on and on; the place in the ring is the rest

    def send(self, parts: Sequence[tuple[int, np.ndarray]]) -> None:
        """Enqueue a copy of each array to its address; the arrays may change at once."""
        sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for _, array in parts]
        start = self._take(sum(sizes))
        for (address, array), size in zip(parts, sizes, strict=True):
            place = self._ring[start : start + array.nbytes]
            place[:] = array.reshape(-1).view(np.uint8)
            self._driver.copy_in(address, place)
            start += size
        self._held.append((self._at - sum(sizes), self._driver.record()))

    def send_large(self, address: int, array: np.ndarray) -> None:
        """The same for one array of any size."""
        flat, piece = array.reshape(-1).view(np.uint8), len(self._ring) // _PIECES
        for start in range(0, flat.size, piece):
            self.send([(address + start, flat[start : start + piece])])

    def _take(self, nbytes: int) -> int:
        """A place of the ring, in one piece, that no outstanding copy reads."""
        size = len(self._ring)
        if nbytes > size:
            raise ValueError(f"{nbytes} bytes to send at once, by a ring of {size}")
        rest = size - self._at % size
        if rest < nbytes:
            self._at += rest
        while self._held and (len(self._held) == self._ahead or self._at + nbytes - self._held[0][0] > size):
            self._driver.wait(self._held.popleft()[1])
        self._at += nbytes
        return (self._at - nbytes) % size
