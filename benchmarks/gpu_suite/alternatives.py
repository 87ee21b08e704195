"""The section of benchmarks/gpu.py that times alternatives: tilings of attention, and inverted residuals.

Every distinct tiling that the registry knows for some architecture is compiled for this GPU and checked. The
inverted residual is compared with PyTorch's convolutions (cuDNN, channels last), which stand for a plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_suite import networks
from gpu_suite.kernels import TIMED_S, share_of
from gpu_suite.setup import Report, Setup, absent_unless_there, seconds_each
from moesr.kernels.plan import ARCHITECTURES, Case, Op

COMPARED = ("attention", "inverted_residual", "aff_filter")


def measure_alternatives(setup: Setup, report: Report) -> None:
    """Time the tilings of all architectures on this GPU, and PyTorch's form of each operator."""
    absent_unless_there("torch", "triton")
    from moesr.kernels.registry import OPS

    for name in COMPARED:
        op = OPS[name]
        for case in [c for c in op.deployed if c.dtype == "fp16"]:  # bfloat16 has the same tilings
            if report.left < 10:
                report.note(f"{name} {case} and later ones were not reached")
                return
            measure_case(op, case, setup, report)


def measure_case(op: Op, case: Case, setup: Setup, report: Report) -> None:
    """Check and time each tiling of one case, then PyTorch's own form."""
    import torch

    from moesr.kernels.check import compare, exact, on_device
    from moesr.kernels.launch import kernel_buffers, launch

    device = networks.device_of()
    inputs = on_device(op.inputs(case.shape, case.dtype, 0), torch.device(device))
    want = op.reference(**{name: exact(value) for name, value in inputs.items()})
    for name, plan in tilings(op, case).items():
        if report.left < 5:
            return
        try:
            buffers = kernel_buffers(op, plan, op.prepare(inputs))
            launch(op, plan, buffers)
            if not report.check(
                f"{op.name} {case}, {name}", max(compare(buffers, want).values()), case.tolerance
            ):
                continue
            timed(report, setup, op, case, name, lambda b=buffers, p=plan: launch(op, p, b))
        except Exception as failure:  # a tiling of another architecture may need too much shared memory
            report.note(f"{op.name} {case}, {name}: {type(failure).__name__}: {str(failure)[:160]}")
    call, given = op.baseline or op.reference, as_pytorch_takes(inputs, case)
    try:
        with torch.no_grad():
            timed(report, setup, op, case, "PyTorch", lambda: call(**given))
    except Exception as failure:  # of any library below; the next case may run
        report.note(f"{op.name} {case}, PyTorch: {type(failure).__name__}: {str(failure)[:160]}")


def tilings(op: Op, case: Case) -> dict[str, Any]:
    """Return the distinct plans of a case by the architectures that they were made for."""
    found: dict[str, tuple[list[int], Any]] = {}
    for arch in ARCHITECTURES:
        try:
            plan = op.plan(case.shape, case.dtype, arch)
        except ValueError:
            continue
        found.setdefault(repr(plan.launches), ([], plan))[0].append(arch)
    return {"tiling of " + ", ".join(f"sm_{a}" for a in archs): plan for archs, plan in found.values()}


def as_pytorch_takes(inputs: dict[str, Any], case: Case) -> dict[str, Any]:
    """Return all weights in the type of the case, and images as cuDNN's convolutions are fastest."""
    import torch

    from moesr.kernels.launch import DTYPES

    found = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
            found[name] = value.to(DTYPES[case.dtype]).contiguous(memory_format=layout)
    return found


def timed(report: Report, setup: Setup, op: Op, case: Case, name: str, run: Callable[[], object]) -> None:
    """Time back-to-back runs."""
    seconds = seconds_each(run, networks.sync_of(networks.device_of()), TIMED_S)
    report.row(f"{op.name}, {name}", str(case), 1e6 * seconds, "us", **share_of(op, case, seconds, setup))
