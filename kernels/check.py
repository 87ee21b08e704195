"""Compares an operator's kernels with its reference, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesr.kernels.launch import architecture, run
from moesr.kernels.plan import Case, Op


def errors(op: Op, case: Case, device: torch.device, arch: int | None = None) -> dict[str, float]:
    """Return the error of each output: RMS of the difference over RMS of the float64 reference.

    For integer outputs it is the share of values that differ. Outputs and scratch are filled with NaN before
    the launches. The reference runs on `device` too. `arch` selects the tiling of another architecture.
    """
    inputs = on_device(op.inputs(case.shape, case.dtype, 0), device)
    want = op.reference(**{name: exact(value) for name, value in inputs.items()})
    plan = op.plan(case.shape, case.dtype, arch or architecture(device))
    return compare(run(op, plan, op.prepare(inputs), poison=True), want)


def on_device(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move tensors to the device; other values stay."""
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}


def compare(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the error of each wanted output; it is NaN if a kernel left memory unwritten."""
    return {name: _error(got[name], want[name].to(got[name].device)) for name in want}


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        raise ValueError(f"got shape {tuple(got.shape)}, want {tuple(want.shape)}")
    if not want.is_floating_point():
        return (got != want).double().mean().item()
    rms = (got.double() - want.double()).square().mean().sqrt()
    size = want.double().square().mean().sqrt()
    return (rms / size).item() if size > 0 else rms.item()


def exact(value: object) -> object:
    """Convert floating-point tensors to float64; other values stay."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
