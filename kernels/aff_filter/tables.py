"""The matrices of the filter's transforms for tensor cores, in float64 and with ortho scaling included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def cosines(width: int) -> tuple[int, int]:
    """Return the numbers of even and odd row frequencies up to W/2."""
    return width // 4 + 1, (width // 2 + 1) // 2


def row_tables(width: int) -> dict[str, Matrix]:
    """Return the real transforms of x[:W/2] + x[W/2:] and x[:W/2] - x[W/2:], and their inverses.

    Each is [W/2 (n), W/2 (r)], the inverses transposed. The columns r are the coefficients that are not zero
    by symmetry: first the real parts, then the imaginary parts.
    """
    half = width // 2
    tables = {}
    for name, start in (("even", 0), ("odd", 1)):
        u = np.arange(start, half + 1, 2)
        angle = -2 * np.pi * (np.outer(np.arange(half), u) % width) / width
        own = (u == 0) | (2 * u == width)  # frequencies that are their own mirror images are real
        forward = np.concatenate([np.cos(angle), np.sin(angle)[:, ~own]], 1) / math.sqrt(width)
        weight = np.concatenate([np.where(own, 1.0, 2.0), np.full((~own).sum(), 2.0)])
        tables[name] = forward
        tables[f"{name}_inverse"] = np.ascontiguousarray((forward * weight).T)
    return tables


def column_tables(n1: int, n2: int, p1: int, p2: int) -> dict[str, Matrix]:
    """Return zero-padded DFT matrices [2, P, P] of both factors and twiddle factors [2, P2 (n2), P1 (k1)]."""
    height = n1 * n2
    turns = np.exp(-2j * np.pi * (np.outer(np.arange(n2), np.arange(n1)) % height) / height)
    return {
        "dft_1": _parts(_dft(n1), p1, p1),
        "dft_2": _parts(_dft(n2), p2, p2),
        "twiddle": _parts(turns, p2, p1),
    }


def _dft(n: int) -> NDArray[Any]:
    index = np.arange(n)
    matrix: NDArray[np.complex128] = np.exp(-2j * np.pi * (np.outer(index, index) % n) / n)
    return matrix / math.sqrt(n)


def _parts(matrix: NDArray[Any], rows: int, columns: int) -> Matrix:
    padded = np.zeros((2, rows, columns))
    padded[:, : matrix.shape[0], : matrix.shape[1]] = np.real(matrix), np.imag(matrix)
    return padded
