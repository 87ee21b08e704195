"""The operators that have kernels: one test suite, one build and one benchmark run over these rows."""

from __future__ import annotations

from moesr.kernels.aff_filter.op import OP as AFF_FILTER
from moesr.kernels.group_norm_silu.op import OP as GROUP_NORM_SILU
from moesr.kernels.inverted_residual.op import OP as INVERTED_RESIDUAL
from moesr.kernels.plan import Op

OPS: dict[str, Op] = {op.name: op for op in (AFF_FILTER, GROUP_NORM_SILU, INVERTED_RESIDUAL)}
