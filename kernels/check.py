"""Compare an operator's kernels with its reference: tests and benchmarks both begin here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moesr.kernels.launch import architecture, run
from moesr.kernels.plan import Case, Op


def errors(op: Op, case: Case, device: torch.device, arch: int | None = None) -> dict[str, float]:
    """RMS error of each output relative to the RMS of the float64 reference, on NaN-poisoned memory.

    Integer outputs: the share that differs. `arch` picks the tiling of another architecture.
    """
    inputs = op.inputs(case.shape, case.dtype, 0)
    want = op.reference(**{name: exact(value) for name, value in inputs.items()})
    plan = op.plan(case.shape, case.dtype, arch or architecture(device))
    prepared = op.prepare(inputs).items()
    buffers = {name: value.to(device) for name, value in prepared if isinstance(value, Tensor)}
    return compare(run(op, plan, buffers, poison=True), want)


def compare(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each of the wanted outputs; NaN where a kernel left memory unwritten."""
    return {name: _error(got[name].cpu(), want[name]) for name in want}


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        raise ValueError(f"got shape {tuple(got.shape)}, want {tuple(want.shape)}")
    if not want.is_floating_point():
        return (got != want).double().mean().item()
    rms = (got.double() - want.double()).square().mean().sqrt()
    size = want.double().square().mean().sqrt()
    return (rms / size).item() if size > 0 else rms.item()


def exact(value: object) -> object:
    """Floating point as float64, everything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
