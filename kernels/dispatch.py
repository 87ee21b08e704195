"""Runs an operator's kernels on tensors; plans and tables are made once for each shape and cached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moesr.kernels.interpreter import interpreted
from moesr.kernels.launch import DTYPES, architecture, run, table
from moesr.kernels.plan import ARCHITECTURES, Op, Scalar, Shape, TritonPlan

NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def run_kernels(op: Op, shape: Shape, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run an operator on the reference's arguments, in the type of x; ValueError if it has no plan."""
    x = inputs["x"]
    key = (op, tuple(sorted(shape.items())), NAMES[x.dtype], architecture(x.device))
    return run(op, _plan(*key), {**op.prepare(inputs), **_tables(*key, x.device)})


def run_buffers(
    op: Op, shape: Shape, like: Tensor, buffers: Mapping[str, Tensor], scalars: Mapping[str, Scalar]
) -> dict[str, Tensor]:
    """Run an operator on the plan's own input buffers; `scalars` replace values of the plan's scalars."""
    plan = plan_for(op, shape, like.dtype, like.device)
    return run(op, replace(plan, scalars={**plan.scalars, **scalars}), buffers)


def has_kernels(tensor: Tensor) -> bool:
    """Return True if kernels can run on the tensor: on CUDA from sm_80, and on a CPU in the interpreter."""
    if tensor.is_cuda:
        return architecture(tensor.device) >= ARCHITECTURES[0]
    return tensor.device.type == "cpu" and interpreted()


def plan_for(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device) -> TritonPlan:
    """Return the cached plan of an operator; ValueError if it has none for this type or shape."""
    if dtype not in FLOATS:
        raise ValueError(f"{op.name} has no kernels for {dtype}, only for {', '.join(map(str, FLOATS))}")
    return _plan(op, tuple(sorted(shape.items())), NAMES[dtype], architecture(device))


@cache
def _plan(op: Op, shape: tuple[tuple[str, int], ...], dtype: str, arch: int) -> TritonPlan:
    return op.plan(dict(shape), dtype, arch)


@cache
def _tables(
    op: Op, shape: tuple[tuple[str, int], ...], dtype: str, arch: int, device: torch.device
) -> dict[str, Tensor]:
    plan = _plan(op, shape, dtype, arch)
    return {b.name: table(plan, b, device) for b in plan.with_role("table")}


def has_plan(op: Op, shape: Shape, x: Tensor) -> bool:
    """Return True if kernels run on x at this shape and in its type; otherwise the reference must run."""
    if not has_kernels(x):
        return False
    try:
        plan_for(op, shape, x.dtype, x.device)
    except ValueError:
        return False
    return True


def wide(*tensors: Tensor) -> list[Tensor]:
    """Convert half precision to float32, in which references compute; other types stay."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def image_dims(x: Tensor) -> dict[str, int]:
    """Return the sizes of [B, C, H, W] by the names that plans use."""
    return dict(zip(("batch", "channels", "height", "width"), x.shape, strict=True))


def channels_last(x: Tensor) -> bool:
    """Return True if [B, C, H, W] is stored as [B, H, W, C]."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def in_layout(y: Tensor, x: Tensor) -> Tensor:
    """Convert y to the type and the memory layout of x."""
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    return y.to(x.dtype).contiguous(memory_format=layout)
