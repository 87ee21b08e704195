"""Builds the tables through which kernels reach canvases: rows of int64, as `kernels/*/kernel.py` read them.

tile_gather   address of the canvas, plane and row strides in elements, y, x, t (not used by the runtime)
tile_blend    addresses of the sums, of the sum of weights and of the flag; plane and row strides; y, x
sampler_step  addresses of z, of the sums and of the float32 coefficients; number of elements; seed; step + 1;
              address of the history, or 0
"""

from __future__ import annotations

import numpy as np

STEP_COLUMNS, COEFFICIENTS = 7, 6

_ALIGNMENT = 16  # alignment of each buffer of a kernel, in bytes


class Table:
    """Arrays packed on the host, each at the offset at which a kernel reads it on the device."""

    def __init__(self, address: int, nbytes: int) -> None:
        """`address` and `nbytes` are those of the table on the device."""
        self.address = address
        self._block, self._size = np.zeros(nbytes, np.uint8), 0

    def clear(self) -> None:
        """Remove all arrays."""
        self._size = 0

    def add(self, rows: np.ndarray) -> int:
        """Append an array and return its address on the device; ValueError if the table is full."""
        start, stop = self._size, self._size + rows.nbytes
        if stop > len(self._block):
            raise ValueError(f"{stop} bytes for a table of {len(self._block)}")
        self._block[start:stop] = rows.reshape(-1).view(np.uint8)
        self._size = -(-stop // _ALIGNMENT) * _ALIGNMENT
        return self.address + start

    @property
    def content(self) -> np.ndarray:
        """The packed arrays, uint8."""
        return self._block[: self._size]


def step_row(
    z: int, sums: int, coefficients: int, size: int, seed: int, step: int, history: int = 0
) -> np.ndarray:
    """Return the row of a sampler's step, uint64 [STEP_COLUMNS]. Step -1 stands for the initial noise."""
    return np.array([z, sums, coefficients, size, seed, (step + 1) % (1 << 64), history], np.uint64)
