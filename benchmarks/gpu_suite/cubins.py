"""The sections of benchmarks/gpu.py about the deployed path: compiled kernels through cuda.core.

`cubins` binds every plan of a kernels.json, checks it against its reference, and times it in a CUDA graph of
our own. `compile` makes such a directory in parallel, if none was brought along.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gpu_suite.kernels import share_of
from gpu_suite.setup import Absent, Report, Setup, absent_unless_there, seconds_each
from moesr.kernels.plan import Case, Op
from moesr.runtime.devices import compiled_kernels, cuda_driver, kernel_search
from moesr.runtime.devices.compiled_kernels import BoundLaunch, KernelFiles
from moesr.runtime.devices.driver import Driver
from moesr.runtime.devices.operator_plan import OperatorPlan
from moesr.runtime.errors import EngineError, MoesrError

REPEATS = 20
"""Runs of a plan in one CUDA graph."""

WORTH = ("attention", "aff_filter", "inverted_residual", "group_norm_silu", "vq_nearest")
"""Operators in the order in which they are measured; those of the loop and of images come last."""


def compile_kernels(setup: Setup, report: Report) -> None:
    """Compile the deployed cases for this GPU in parallel processes, unless there are prebuilt kernels."""
    if setup.kernels:
        raise Absent(f"not needed: the kernels are those of {setup.kernels}")
    absent_unless_there("torch", "triton", "cuda.core")
    from moesr.kernels.build import build
    from moesr.kernels.plan import ARCHITECTURES

    capability, target = cuda_driver.device_capability(cuda_driver.open_device(0)), setup.compiled
    if capability not in ARCHITECTURES:
        raise Absent(f"kernels are not compiled for sm_{capability}, whose driver compiles the PTX")
    start = time.perf_counter()
    if not (target / compiled_kernels.KERNELS_NAME).is_file():
        shutil.rmtree(target, ignore_errors=True)  # what a call left that was ended
        build(target, (capability,), cache=setup.cache / "compiled", processes=os.cpu_count())
    report.row("compiler", f"all kernels, {os.cpu_count()} processes", time.perf_counter() - start, "s")


def measure_cubins(setup: Setup, report: Report) -> None:
    """Check and time every plan of the prebuilt or compiled kernels, then those that the package ships."""
    absent_unless_there("torch", "cuda.core")
    driver = cuda_driver.CudaDriver(0)
    try:
        for directory in (*filter(None, (setup.kernels, setup.compiled)), kernel_search.SHIPPED):
            if (directory / compiled_kernels.KERNELS_NAME).is_file():
                _measure_directory(directory, driver, setup, report)
    finally:
        driver.close()


def _measure_directory(directory: Path, driver: Driver, setup: Setup, report: Report) -> None:
    try:
        files = KernelFiles.of(directory, driver)
    except EngineError as error:
        report.note(str(error))
        return
    plans = [plan for plan in compiled_kernels.read(directory).plans if files.architecture in plan.targets]
    plans.sort(key=lambda plan: WORTH.index(plan.op) if plan.op in WORTH else len(WORTH))
    for at, plan in enumerate(plans):
        if report.left < 5:
            report.note(f"{directory.name}: {len(plans) - at} of {len(plans)} plans were not reached")
            return
        name = f"cubin {plan.op} {plan.case}-{plan.dtype}"
        try:
            error, tolerance, seconds, case = run_plan(plan, files, driver)
        except (MoesrError, ValueError, RuntimeError) as failure:
            report.note(f"{name}: {type(failure).__name__}: {' '.join(str(failure).split()):.200}")
            report.check(name, float("nan"), 0.0)
            continue
        if report.check(name, error, tolerance):
            share = share_of(operator(plan.op), case, seconds, setup)
            report.row(f"cubin {plan.op}", str(case), 1e6 * seconds, "us", **share)


def operator(name: str) -> Op:
    """Return an operator's row of the registry."""
    from moesr.kernels.registry import OPS

    return OPS[name]


def run_plan(plan: OperatorPlan, files: KernelFiles, driver: Driver) -> tuple[float, float, float, Case]:
    """Return the largest error of a plan's outputs, its tolerance, the seconds of a run, and its case."""
    from moesr.kernels.check import compare, exact

    op = operator(plan.op)
    case = next((c for c in op.deployed if (c.shape, c.dtype) == (plan.shape, plan.dtype)), None)
    if case is None:
        tolerance = next(c.tolerance for c in op.cases if c.dtype == plan.dtype)
        case = Case(plan.case, plan.shape, plan.dtype, tolerance)
    inputs = on_gpu(op.inputs(case.shape, case.dtype, 0))
    want = op.reference(**{name: exact(value) for name, value in inputs.items()})
    tensors = buffers_of(op, plan, op.prepare(inputs), files)
    launches = list(bound(plan, files, {name: address_of(t, driver) for name, t in tensors.items()}))
    finish_torch()
    enqueue(launches, driver)
    driver.synchronize()
    found = max(compare(tensors, want).values())
    return found, case.tolerance, seconds_in_graph(launches, driver), case


def buffers_of(op: Op, plan: OperatorPlan, given: Mapping[str, Any], files: KernelFiles) -> dict[str, Any]:
    """Return a tensor for every buffer; outputs and scratch hold NaN, or the largest value."""
    import torch

    from moesr.kernels.launch import DTYPES

    device, found = next(v.device for v in given.values() if isinstance(v, torch.Tensor)), {}
    for b in plan.buffers:
        size, dtype = b.dims(plan.scalars), DTYPES[b.dtype]
        if b.role == "table":
            stored = torch.frombuffer(bytearray(files.table(b)), dtype=dtype).reshape(size)
            found[b.name] = stored.to(device)
        elif b.role in ("input", "state"):
            found[b.name] = given[b.name].contiguous()
        else:
            fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
            found[b.name] = torch.full(size, fill, dtype=dtype, device=device)
    if op.link:
        op.link(found)
    return found


def bound(plan: OperatorPlan, files: KernelFiles, addresses: Mapping[str, int]) -> Iterator[BoundLaunch]:
    """Yield the launches of a plan between buffers."""
    for launch in plan.launches:
        yield files.bind(launch, addresses, plan.scalars, keep=False)


def enqueue(launches: list[BoundLaunch], driver: Driver) -> None:
    """Launch all kernels of a plan."""
    for launch in launches:
        launch.enqueue(driver)


def seconds_in_graph(launches: list[BoundLaunch], driver: Driver) -> float:
    """Return the seconds of one run, from a CUDA graph of REPEATS runs."""
    driver.begin_capture()
    try:
        for _ in range(REPEATS):
            enqueue(launches, driver)
    except BaseException:
        driver.abandon_capture()
        raise
    graph = driver.end_capture()
    return seconds_each(partial(driver.replay, graph), driver.synchronize, 0.02) / REPEATS


def on_gpu(values: Mapping[str, Any]) -> dict[str, Any]:
    """Move tensors to the GPU."""
    import torch

    from gpu_suite import networks
    from moesr.kernels.check import on_device

    return on_device(values, torch.device(networks.device_of()))


def address_of(tensor: Any, driver: Driver) -> int:
    """Return the address of a tensor in the GPU's memory."""
    del driver
    return int(tensor.data_ptr())


def finish_torch() -> None:
    """Wait for PyTorch's own stream, on which tensors are filled."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
