"""Run an operator's kernels on tensors, with its plan and tables made once for each shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moesr.kernels.launch import DTYPES, architecture, run, table
from moesr.kernels.plan import Op, Plan, Shape

NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def run_kernels(op: Op, shape: Shape, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs by name; `inputs` as the reference takes them, x first among the types. ValueError: no plan fits."""
    x = inputs["x"]
    key = (op, tuple(sorted(shape.items())), NAMES[x.dtype], architecture(x.device))
    return run(op, _plan(*key), {**op.prepare(inputs), **_tables(*key, x.device)})


@cache
def _plan(op: Op, shape: tuple[tuple[str, int], ...], dtype: str, arch: int) -> Plan:
    return op.plan(dict(shape), dtype, arch)


@cache
def _tables(
    op: Op, shape: tuple[tuple[str, int], ...], dtype: str, arch: int, device: torch.device
) -> dict[str, Tensor]:
    plan = _plan(op, shape, dtype, arch)
    return {b.name: table(plan, b, device) for b in plan.with_role("table")}


def has_plan(op: Op, shape: Shape, x: Tensor) -> bool:
    """Whether the kernels take this shape and type; the reference does otherwise."""
    if x.dtype not in FLOATS:
        return False
    try:
        _plan(op, tuple(sorted(shape.items())), NAMES[x.dtype], architecture(x.device))
    except ValueError:
        return False
    return True
