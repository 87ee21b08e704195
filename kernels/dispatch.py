"""What the torch.library operators share: plans kept by shape, and when the kernels run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from moesr.kernels.interpreter import interpreted
from moesr.kernels.launch import DTYPES, architecture, run, table
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
    key = (op, tuple(shape.items()), TYPE_NAMES[like.dtype], architecture(like.device))
    return run(op, plan, {**buffers, **_tables(*key, like.device)})


def fits(op: Op, shape: Shape, like: Tensor) -> bool:
    """Whether kernels run on the memory of `like`, in its type and at this shape; the reference does otherwise."""
    if not has_kernels(like) or like.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    try:
        plan_for(op, shape, like.dtype, like.device)
    except ValueError:
        return False
    return True


def wide(*tensors: Tensor) -> list[Tensor]:
    """Half precision as float32, which references sum and transform in; other types stay."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def channels_last(x: Tensor) -> bool:
    """Whether [B, C, H, W] lies in memory as [B, H, W, C]."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def in_layout(y: Tensor, x: Tensor) -> Tensor:
    """y in the type and the memory layout of x."""
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    return y.to(x.dtype).contiguous(memory_format=layout)


def plan_for(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan of an operator, made once; ValueError for a type that kernels do not know."""
    if dtype not in TYPE_NAMES:
        raise ValueError(f"{op.name} has no kernels for {dtype}, only for {', '.join(map(str, TYPE_NAMES))}")
    return _plan(op, tuple(shape.items()), TYPE_NAMES[dtype], architecture(device))


@lru_cache(maxsize=256)
def _plan(op: Op, shape: tuple[tuple[str, int], ...], dtype: str, arch: int) -> Plan:
    return op.plan(dict(shape), dtype, arch)


@lru_cache(maxsize=256)
def _tables(
    op: Op, shape: tuple[tuple[str, int], ...], dtype: str, arch: int, device: torch.device
) -> dict[str, Tensor]:
    plan = _plan(op, shape, dtype, arch)
    return {b.name: table(plan, b, device) for b in plan.with_role("table")}
