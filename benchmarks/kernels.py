"""Check every kernel, then time it on a GPU beside what PyTorch does, eager and compiled.

Each row: median and quantiles of a launch replayed from a CUDA graph with a cold L2 cache, and the share of
this machine's measured copy or matrix rate. Without a GPU only the checks run, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import machine_line

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from moesr.kernels.check import errors  # noqa: E402
from moesr.kernels.launch import DTYPES, architecture, kernel_buffers, launch  # noqa: E402
from moesr.kernels.plan import Case, Op  # noqa: E402
from moesr.kernels.registry import OPS  # noqa: E402

RUNS, WARM_UP = 100, 10
QUANTILES = (0.5, 0.1, 0.9)
FLUSH_BYTES = 256 << 20  # more than any L2 cache
RESULTS = Path(__file__).parent / "results" / "kernels-gpu.md"
COLUMNS = (
    "op", "case", "error", "kernel us (p10, p90)", "eager us", "compiled us",
    "TB/s", "of copy", "TFLOP/s", "of matmul",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What this GPU reaches: a copy of 1 GiB, and a product of 8192-wide fp16 matrices."""

    bytes_per_s: float
    flops_per_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then time; 1 where a kernel is wrong. 0 without a GPU, after the checks."""
    args = parser().parse_args(argv)
    ops = [OPS[name] for name in args.op]
    device = torch.device("cuda" if GPU else "cpu")
    if failures := [line for op in ops for line in check(op, device)]:
        print("\n".join(failures), file=sys.stderr)
        return 1
    if not GPU:
        print("no GPU here: the kernels passed their checks in the interpreter, nothing was timed")
        return 0
    limits = measure_limits()
    lines = [
        "# Kernels on a GPU\n",
        f"`python benchmarks/kernels.py`: {torch.cuda.get_device_name()}; {machine_line()}\n",
        f"Measured limits: copy {limits.bytes_per_s / 1e12:.2f} TB/s, fp16 matrix product "
        f"{limits.flops_per_s / 1e12:.0f} TFLOP/s.\n",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
    ]
    print("\n".join(lines), flush=True)
    for op in ops:
        for case in op.deployed:
            lines.append(row(op, case, device, limits))
            print(lines[-1], flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--op", nargs="+", choices=sorted(OPS), default=sorted(OPS), help="default: all")
    p.add_argument("-o", "--output", type=Path, default=RESULTS, help="default: %(default)s")
    return p


def check(op: Op, device: torch.device) -> Iterator[str]:
    """Run the op's cases; a line for each error above its tolerance."""
    for case in op.cases:
        if case.slow and not GPU:
            continue
        for name, error in errors(op, case, device).items():
            if not error <= case.tolerance:
                yield f"{op.name} {case}: {name} has error {error:.1e}, at most {case.tolerance:.0e}"


def row(op: Op, case: Case, device: torch.device, limits: Limits) -> str:
    """Check one deployed case at its size, then time its three forms."""
    error = max(errors(op, case, device).values())
    if not error <= case.tolerance:
        return f"| {op.name} | {case} | {error:.1e}: above {case.tolerance:.0e}, not timed |" + " |" * 7
    inputs = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v
        for k, v in op.inputs(case.shape, case.dtype, 0).items()
    }
    plan = op.plan(case.shape, case.dtype, architecture(device))
    buffers = kernel_buffers(op, plan, op.prepare(inputs))
    kernel, low, high = time_us(lambda: launch(op, plan, buffers))
    baseline = op.baseline or op.reference
    typed = {
        k: v.to(DTYPES[case.dtype]) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    eager = _time_or_reason(lambda: baseline(**typed))
    compiled_baseline = torch.compile(baseline)
    compiled = _time_or_reason(lambda: compiled_baseline(**typed))
    cost = op.cost(case.shape, case.dtype)
    rate, flops = cost.bytes / kernel * 1e6, cost.flops / kernel * 1e6
    cells = [op.name, str(case), f"{error:.1e}", f"{kernel:.1f} ({low:.1f}, {high:.1f})", eager, compiled]
    cells += [f"{rate / 1e12:.2f}", f"{rate / limits.bytes_per_s:.0%}"]
    cells += [f"{flops / 1e12:.0f}", f"{flops / limits.flops_per_s:.0%}"] if cost.flops else ["-", "-"]
    return f"| {' | '.join(cells)} |"


def _time_or_reason(function: Callable[[], object]) -> str:
    try:
        return f"{time_us(function)[0]:.1f}"
    except RuntimeError as error:  # half precision FFT of odd sizes, a graph break in capture
        return str(error).splitlines()[0][:40]


def time_us(function: Callable[[], object]) -> tuple[float, ...]:
    """Microseconds of one replay of a CUDA graph: QUANTILES over RUNS, L2 flushed before each."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for start, end in events:
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) * 1e3 for start, end in events], dtype=torch.float64)
    return tuple(torch.quantile(times, q).item() for q in QUANTILES)


def measure_limits() -> Limits:
    """Copy and matrix rates, by the same clock as the kernels."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = time_us(lambda: target.copy_(source))[0]
    side = 8192
    a = torch.randn(side, side, dtype=torch.float16, device="cuda")
    product = time_us(lambda: torch.mm(a, a))[0]
    return Limits(2 * source.numel() / copy * 1e6, 2 * side**3 / product * 1e6)


if __name__ == "__main__":
    sys.exit(main())
