"""The kernels section of benchmarks/gpu.py: compare all cases with their references and time those in use."""

from __future__ import annotations

from typing import Any

from gpu_suite import networks
from gpu_suite.setup import Report, Setup, rates, seconds_each
from moesr.kernels.check import errors
from moesr.kernels.launch import architecture, kernel_buffers, launch
from moesr.kernels.plan import Case, Op
from moesr.kernels.registry import OPS

TIMED_S = 0.05


def measure_kernels(setup: Setup, report: Report) -> None:
    """Check and time the cases in use first, then check the others while there is time."""
    device = networks.device_of()
    in_use = [(op, case) for op in OPS.values() for case in op.deployed]
    others = [(op, case) for op in OPS.values() for case in op.cases if case not in op.deployed]
    for at, (op, case) in enumerate([*in_use, *others]):
        if report.left < 5:
            report.note(f"{len(in_use) + len(others) - at} cases of kernels were not reached")
            return
        if right(op, case, device, report) and at < len(in_use):
            time_case(op, case, device, setup, report)


def right(op: Op, case: Case, device: str, report: Report) -> bool:
    """Check a case; returns True if it is within its tolerance."""
    import torch

    try:
        error = max(errors(op, case, torch.device(device)).values())
    except Exception as failure:  # compiling and launching can raise anything; only this case fails
        report.note(f"{op.name} {case}: {type(failure).__name__}: {' '.join(str(failure).split()):.200}")
        error = float("nan")
    return report.check(f"{op.name} {case}", error, case.tolerance)


def time_case(op: Op, case: Case, device: str, setup: Setup, report: Report) -> None:
    """Time a case by launches in sequence, with data in cache if it fits."""
    import torch

    inputs = op.prepare(op.inputs(case.shape, case.dtype, 0))
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    plan = op.plan(case.shape, case.dtype, architecture(torch.device(device)))
    buffers = kernel_buffers(op, plan, moved)
    sync = networks.sync_of(device)
    seconds = seconds_each(lambda: launch(op, plan, buffers), sync, TIMED_S)
    report.row(f"kernel {op.name}", str(case), 1e6 * seconds, "us", **share_of(op, case, seconds, setup))


def share_of(op: Op, case: Case, seconds: float, setup: Setup) -> dict[str, Any]:
    """Return the larger of the case's fractions of the copy rate and the matrix rate."""
    cost, limits = op.cost(case.shape, case.dtype), rates(setup)
    if not limits:
        return {}
    shares = {
        "copy rate": cost.bytes / seconds / limits["bytes_per_s"],
        "matrix rate": cost.flops / seconds / limits["flops_per_s"],
    }
    limit = max(shares, key=lambda name: shares[name])
    return {"share": shares[limit], "limit": limit}
