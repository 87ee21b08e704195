"""Copies of host arrays to a GPU through pinned memory that is filled while earlier copies still run."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from moesr.runtime.devices.driver import Driver

UPLOAD_BYTES = 32 << 20
"""The size of the ring that the users of a driver share for images and weights."""

_ALIGNMENT = 16
_PIECES = 4  # a large array is sent in quarters of the ring, so that filling and copying overlap


class Staging:
    """A ring of pinned bytes. A byte is overwritten only after the device has read it."""

    def __init__(self, driver: Driver, nbytes: int, ahead: int | None = None) -> None:
        """Allocate the ring; `ahead` limits the outstanding sends before the host waits for the device."""
        self._driver, self._ring, self._ahead = driver, driver.pinned(nbytes), ahead
        self._held: deque[tuple[int, Any]] = deque()  # start of each send, and the event at its end
        self._at = 0  # bytes sent so far; the remainder is the position in the ring

    @classmethod
    def of(cls, driver: Driver) -> Staging:
        """Return the ring for images and weights, which all users of a driver share."""
        if cls not in driver.shared:
            driver.shared[cls] = cls(driver, UPLOAD_BYTES)
        return driver.shared[cls]

    def send(self, parts: Sequence[tuple[int, np.ndarray]]) -> None:
        """Enqueue a copy of each array to its address; the arrays may change as soon as this returns."""
        sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for _, array in parts]
        start = self._take(sum(sizes))
        for (address, array), size in zip(parts, sizes, strict=True):
            place = self._ring[start : start + array.nbytes]
            place[:] = array.reshape(-1).view(np.uint8)
            self._driver.copy_in(address, place)
            start += size
        self._held.append((self._at - sum(sizes), self._driver.record()))

    def send_large(self, address: int, array: np.ndarray) -> None:
        """Enqueue a copy of one array of any size, in pieces."""
        flat, piece = array.reshape(-1).view(np.uint8), len(self._ring) // _PIECES
        for start in range(0, flat.size, piece):
            self.send([(address + start, flat[start : start + piece])])

    def _take(self, nbytes: int) -> int:
        """Return the start of a contiguous part of the ring that no outstanding copy reads."""
        size = len(self._ring)
        if nbytes > size:
            raise ValueError(f"{nbytes} bytes cannot be sent at once through a ring of {size}")
        rest = size - self._at % size
        if rest < nbytes:
            self._at += rest
        while self._held and (len(self._held) == self._ahead or self._at + nbytes - self._held[0][0] > size):
            self._driver.wait(self._held.popleft()[1])
        self._at += nbytes
        return (self._at - nbytes) % size
