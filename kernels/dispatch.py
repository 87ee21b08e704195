"""What the torch.library operators share: plans kept by shape, and when the kernels run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from moesr.kernels.interpreter import interpreted
from moesr.kernels.launch import DTYPES, architecture, run
from moesr.kernels.plan import Op, Plan, Scalar, Shape

TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def has_kernels(tensor: Tensor) -> bool:
    """Whether kernels can run on the tensor's memory; where not, an operator computes its reference."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and interpreted())


def call(
    op: Op,
    shape: Shape,
    like: Tensor,
    buffers: Mapping[str, Tensor],
    scalars: Mapping[str, Scalar] | None = None,
) -> dict[str, Tensor]:
    """Run an operator in the type and on the device of `like`; `scalars` replace the plan's own."""
    plan = plan_for(op, shape, like.dtype, like.device)
    if scalars:
        plan = replace(plan, scalars={**plan.scalars, **scalars})
    return run(op, plan, buffers)


def plan_for(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan of an operator, made once; ValueError for a type that kernels do not know."""
    if dtype not in TYPE_NAMES:
        raise ValueError(f"{op.name} has no kernels for {dtype}, only for {', '.join(map(str, TYPE_NAMES))}")
    return _plan(op, tuple(shape.items()), TYPE_NAMES[dtype], architecture(device))


@lru_cache(maxsize=256)
def _plan(op: Op, shape: tuple[tuple[str, int], ...], dtype: str, arch: int) -> Plan:
    return op.plan(dict(shape), dtype, arch)
