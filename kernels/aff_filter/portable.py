"""The adaptive frequency filter by real matrix products, which every backend has, without an FFT operator.

The transforms are written over a small set of tensor operations (`TensorOps`), so that the same code runs in
PyTorch (tests) and writes an ONNX graph (export). The README explains the maths, the layouts and the costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesr.kernels.aff_filter.reference import SHRINK, SLOPE

Matrix = NDArray[Any]
Weights = tuple[Matrix, Matrix, Matrix, Matrix]


class TensorOps(Protocol):
    """The tensor operations that the filter uses. A leading 0 in `reshape` keeps the batch."""

    def shape(self, x: Any) -> tuple[int, ...]: ...  # noqa: D102
    def reshape(self, x: Any, *shape: int) -> Any: ...  # noqa: D102
    def transpose(self, x: Any, *order: int) -> Any: ...  # noqa: D102
    def split(self, x: Any, axis: int, *sizes: int) -> list[Any]: ...  # noqa: D102
    def concat(self, parts: list[Any], axis: int) -> Any: ...  # noqa: D102
    def sum(self, x: Any, axis: int) -> Any: ...  # noqa: D102
    def matmul(self, a: Any, b: Any) -> Any: ...  # noqa: D102
    def add(self, a: Any, b: Any) -> Any: ...  # noqa: D102
    def sub(self, a: Any, b: Any) -> Any: ...  # noqa: D102
    def mul(self, a: Any, b: Any) -> Any: ...  # noqa: D102
    def pointwise(self, x: Any, weight: Matrix, bias: Matrix, groups: int) -> Any: ...  # noqa: D102
    def leaky_relu(self, x: Any, slope: float) -> Any: ...  # noqa: D102
    def soft_shrink(self, x: Any, threshold: float) -> Any: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class DftPlan:
    """Float32 matrices of the two-dimensional real DFT of one size, with ortho scaling included."""

    height: int
    width: int
    rows_even: Matrix  # [2, W/2, even frequencies] (real, imaginary), of x[:W/2] + x[W/2:]
    rows_odd: Matrix  # [2, W/2, odd frequencies], of x[:W/2] - x[W/2:]
    rows_even_inverse: Matrix  # [2, even frequencies, W/2]
    rows_odd_inverse: Matrix  # [2, odd frequencies, W/2]
    stage_1: Matrix  # [2 N1, 2 N1], over n1 at fixed n2: rows (k1, part), columns (part, n1)
    stage_2: Matrix  # [N1, 2 N2, 2 N2], over n2, with twiddle factors: rows (part, k2), columns (part, n2)

    @property
    def factors(self) -> tuple[int, int]:
        """(N1, N2) with N1 * N2 = height."""
        return self.stage_2.shape[0], self.stage_2.shape[1] // 2

    @property
    def frequencies(self) -> tuple[int, int]:
        """The numbers of even and odd row frequencies; together W/2 + 1."""
        return self.rows_even.shape[2], self.rows_odd.shape[2]


def make_plan(height: int, width: int, first_factor: int | None = None) -> DftPlan:
    """Make the matrices for a size.

    `first_factor` is N1 (1: one dense product); by default it is the largest divisor up to the square root of
    the height.
    """
    if width % 2:
        raise ValueError(f"the width must be even, got {width}")
    n1 = first_factor or max(d for d in range(1, math.isqrt(height) + 1) if height % d == 0)
    n2 = height // n1
    u, n = np.arange(width // 2 + 1), np.arange(width // 2)
    rows = _roots(np.outer(n, u), width)  # [W/2, W/2+1]
    weight = np.where((u == 0) | (2 * u == width), 1.0, 2.0)  # a column also represents its mirror image
    k1, k2 = np.arange(n1), np.arange(n2)
    stage_1 = _real_form(_roots(np.outer(k1, k1), n1))  # [(part, k1), (part, n1)]
    frequency = k1[:, None, None] + n1 * k2[:, None]  # [N1, N2 (k2), 1]
    stage_2 = _real_form(_roots(frequency * k2, height) * math.sqrt(n1))
    parts = np.stack([np.real(rows), np.imag(rows)])
    inverse = (parts * weight).transpose(0, 2, 1)
    matrices = (
        parts[..., 0::2],
        parts[..., 1::2],
        inverse[:, 0::2],
        inverse[:, 1::2],
        stage_1.reshape(2, n1, 2 * n1).swapaxes(0, 1).reshape(2 * n1, 2 * n1),
        stage_2,
    )
    return DftPlan(height, width, *(np.ascontiguousarray(m, np.float32) for m in matrices))


def _roots(exponents: Matrix, n: int) -> Matrix:
    """`exp(-2 pi i exponents / n) / sqrt(n)` in float64; the exponents are reduced modulo n as integers."""
    return np.exp(-2j * np.pi * (exponents % n) / n) / math.sqrt(n)


def _real_form(matrix: Matrix) -> Matrix:
    """Return a complex matrix [..., r, c] as a real one [..., 2r, 2c] for stacked (real, imaginary) parts."""
    real, imag = np.real(matrix), np.imag(matrix)
    return np.block([[real, -imag], [imag, real]])


def rfft2(plan: DftPlan, x: Any, ops: TensorOps) -> Any:
    """Transform [B, C, H, W] to [B, C, N1 (k1), 2 (part), N2 (k2), U].

    Row frequencies are k1 + N1 k2; of the U column frequencies the even ones come first.
    """
    c, (n1, n2), u = ops.shape(x)[1], plan.factors, sum(plan.frequencies)
    low, high = ops.split(
        ops.reshape(x, 0, c, 1, plan.height, plan.width), 4, plan.width // 2, plan.width // 2
    )
    even = ops.matmul(ops.add(low, high), plan.rows_even)  # [B, C, 2, H, even]
    odd = ops.matmul(ops.sub(low, high), plan.rows_odd)
    h = ops.reshape(ops.concat([even, odd], 4), 0, c, 2 * n1, n2 * u)
    h = ops.reshape(ops.matmul(plan.stage_1, h), 0, c, n1, 2 * n2, u)
    return ops.reshape(ops.matmul(plan.stage_2, h), 0, c, n1, 2, n2, u)


def irfft2(plan: DftPlan, spectrum: Any, ops: TensorOps) -> Any:
    """Invert `rfft2`. Every stage is orthogonal, so its inverse is its transpose."""
    c, (n1, n2), u = ops.shape(spectrum)[1], plan.factors, sum(plan.frequencies)
    h = ops.reshape(spectrum, 0, c, n1, 2 * n2, u)
    h = ops.matmul(plan.stage_2.swapaxes(1, 2), h)
    h = ops.matmul(plan.stage_1.T, ops.reshape(h, 0, c, 2 * n1, n2 * u))
    even, odd = ops.split(ops.reshape(h, 0, c, 2, plan.height, u), 4, *plan.frequencies)
    even = ops.sum(ops.matmul(even, plan.rows_even_inverse), 2)  # [B, C, H, W/2]
    odd = ops.sum(ops.matmul(odd, plan.rows_odd_inverse), 2)
    return ops.concat([ops.add(even, odd), ops.sub(even, odd)], 3)


def aff_filter(plan: DftPlan, x: Any, weights: Weights, ops: TensorOps) -> Any:
    """Compute `reference.aff_filter` for the plan's size; `weights` are its (w1, b1, w2, b2)."""
    w1, b1, w2, b2 = weights
    c, blocks, (n1, n2), u = ops.shape(x)[1], w1.shape[1], plan.factors, sum(plan.frequencies)
    size = c // blocks
    spectrum = ops.reshape(rfft2(plan, x, ops), 0, blocks, size, n1, 2, n2 * u)
    spectrum = ops.transpose(spectrum, 0, 1, 4, 2, 3, 5)  # [B, blocks, part, channels of the block, ...]
    h = ops.reshape(spectrum, 0, 2 * c, plan.height, u)
    h = ops.leaky_relu(ops.pointwise(h, *_layer(w1, b1), blocks), SLOPE)
    h = ops.soft_shrink(ops.pointwise(h, *_layer(w2, b2), blocks), SHRINK)
    mask = ops.reshape(h, 0, blocks, 2, size, n1, n2 * u)
    (a, b), (c_, d) = ops.split(spectrum, 2, 1, 1), ops.split(mask, 2, 1, 1)
    real = ops.sub(ops.mul(a, c_), ops.mul(b, d))
    imag = ops.add(ops.mul(a, d), ops.mul(b, c_))
    filtered = ops.transpose(ops.concat([real, imag], 2), 0, 1, 3, 4, 2, 5)
    return ops.add(irfft2(plan, ops.reshape(filtered, 0, c, n1, 2, n2, u), ops), x)


def _layer(weight: Matrix, bias: Matrix) -> tuple[Matrix, Matrix]:
    """Return a complex block-diagonal layer as a real weight [blocks * 2 out, 2 in] and bias."""
    matrix = (weight[0] + 1j * weight[1]).swapaxes(1, 2)  # [blocks, out, in]
    return _real_form(matrix).reshape(-1, 2 * weight.shape[2]), bias.swapaxes(0, 1).reshape(-1)
