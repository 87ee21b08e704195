"""Runs a plan in PyTorch with Triton's just-in-time compiler, or in its interpreter on a CPU."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from moesr.kernels.interpreter import interpreted, repair
from moesr.kernels.plan import Op, PlanBuffer, TritonPlan

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "u16": torch.uint16,
    "u8": torch.uint8,
}


def kernel_module(op: str) -> ModuleType:
    """Import the module with the operator's Triton functions."""
    return importlib.import_module(f"moesr.kernels.{op}.kernel")


def architecture(device: torch.device) -> int:
    """Return the compute capability as one number, such as 90; on a CPU the interpreter stands in for 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def run(op: Op, plan: TritonPlan, buffers: Mapping[str, Tensor], poison: bool = False) -> dict[str, Tensor]:
    """Launch a plan on its input and state buffers and return its outputs and states by name.

    `poison` fills scratch and output buffers with NaN (integers: the largest value) before the launches.
    """
    given = kernel_buffers(op, plan, buffers)
    if poison:
        for b in plan.with_role("scratch", "output"):
            full = given[b.name]
            full.fill_(float("nan") if full.is_floating_point() else torch.iinfo(full.dtype).max)
    launch(op, plan, given)
    return {b.name: given[b.name] for b in plan.with_role("output", "state")}


def kernel_buffers(op: Op, plan: TritonPlan, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all buffers of a plan: the given ones after a check, and new tables, scratch and outputs.

    ValueError is raised if a given buffer has the wrong type or shape.
    """
    given: dict[str, Tensor] = {}
    for b in plan.with_role("input", "state"):
        value = given[b.name] = buffers[b.name].contiguous()
        if value.dtype != DTYPES[b.dtype] or tuple(value.shape) != b.dims(plan.scalars):
            got = f"{value.dtype} {tuple(value.shape)}"
            raise ValueError(f"{op.name}: {b.name} is {got}, the plan takes {b.dtype} {b.dims(plan.scalars)}")
    device = next(iter(given.values())).device
    for b in plan.with_role("table"):
        given[b.name] = buffers[b.name] if b.name in buffers else table(plan, b, device)
    for b in plan.with_role("scratch", "output"):
        given[b.name] = torch.empty(b.dims(plan.scalars), dtype=DTYPES[b.dtype], device=device)
    if op.link:
        op.link(given)
    return given


def table(plan: TritonPlan, buffer: PlanBuffer, device: torch.device) -> Tensor:
    """Return a constant buffer of a plan on a device."""
    return torch.from_numpy(plan.tables[buffer.name]).to(device, DTYPES[buffer.dtype])


def launch(op: Op, plan: TritonPlan, buffers: Mapping[str, Tensor]) -> None:
    """Launch a plan on a complete set of buffers, without allocations or checks."""
    functions = kernel_module(op.name)
    if interpreted():
        repair()
    for step in plan.launches:
        arguments = [buffers[a] if a in buffers else plan.scalars[a] for a in step.arguments]
        function = getattr(functions, step.function)
        options = {"num_warps": step.num_warps, "num_stages": step.num_stages}
        function[plan.grid(step)](*arguments, **step.constants, **options, enable_fp_fusion=step.fp_fusion)
