"""Check every kernel, then time it on a GPU beside PyTorch's own operators, eager and compiled.

Each row has the median and quantiles of a launch replayed from a CUDA graph with a cold L2 cache, and the
fraction of this machine's measured copy or matrix rate. The results go to results/kernels-GPU.md and .json.
Without a GPU only the checks run, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchlib.checkout import find_package

find_package()

import benchlib.missing_extra  # noqa: E402, F401
import torch  # noqa: E402
from benchlib.machine import machine  # noqa: E402
from benchlib.origin import origin_line  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from moesr.kernels.check import errors, on_device  # noqa: E402
from moesr.kernels.launch import DTYPES, architecture, kernel_buffers, launch  # noqa: E402
from moesr.kernels.plan import Case, Op, check_compiler  # noqa: E402
from moesr.kernels.registry import OPS  # noqa: E402
from moesr.runtime.errors import UsageError  # noqa: E402

RUNS, WARM_UP = 100, 10
QUANTILES = (0.5, 0.1, 0.9)
FLUSH_BYTES = 256 << 20  # more than any L2 cache
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "op", "case", "error", "kernel us (p10, p90)", "eager us", "compiled us", "TB/s", "of copy", "TFLOP/s",
    "of matmul",
)  # fmt: skip

Times = tuple[float, ...]
Clock = Callable[[Callable[[], object]], Times]  # times a call: microseconds at QUANTILES


@dataclass(frozen=True)
class Limits:
    """Rates that this GPU reaches in a copy of 1 GiB and in a product of 8192-wide fp16 matrices."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Row:
    """One deployed case: its largest error, times, and the rates of its necessary traffic and products.

    If a form of PyTorch does not run, the reason is given instead of a time. A wrong kernel has no times.
    """

    op: str
    case: str
    error: float
    tolerance: float
    kernel_us: Times = ()
    eager_us: float | str = "-"
    compiled_us: float | str = "-"
    bytes_per_s: float = 0.0
    flops_per_s: float = 0.0
    of_copy: float = 0.0
    of_matmul: float = 0.0

    @property
    def fastest_of_pytorch(self) -> float:
        """The shorter time of eager and compiled PyTorch; infinite if neither runs."""
        return min(
            (t for t in (self.eager_us, self.compiled_us) if isinstance(t, float)), default=float("inf")
        )

    def markdown(self) -> str:
        """Return the row of the table."""
        if not self.kernel_us:
            cells = [self.op, self.case, f"{self.error:.1e}, at most {self.tolerance:.0e}: not timed"]
            return f"| {' | '.join(cells)} |" + " |" * (len(COLUMNS) - len(cells))
        median, low, high = self.kernel_us
        matmul = (
            [f"{self.flops_per_s / 1e12:.0f}", f"{self.of_matmul:.0%}"] if self.flops_per_s else ["-"] * 2
        )
        pytorch = [f"{t:.1f}" if isinstance(t, float) else t for t in (self.eager_us, self.compiled_us)]
        cells = [self.op, self.case, f"{self.error:.1e}", f"{median:.1f} ({low:.1f}, {high:.1f})", *pytorch]
        cells += [f"{self.bytes_per_s / 1e12:.2f}", f"{self.of_copy:.0%}", *matmul]
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class SpeedGoal:
    """A speed that a kernel should reach on an H200."""

    op: str
    case: str
    text: str
    met: Callable[[Row], bool]


GOALS = (
    SpeedGoal("aff_filter", "full512-fp16", "under 250 us", lambda row: row.kernel_us[0] < 250),
    SpeedGoal("attention", "decoder512-fp16", "above 250 TFLOP/s", lambda row: row.flops_per_s > 250e12),
    SpeedGoal(
        "group_norm_silu", "decoder512-fp16", "above 70 % of copy speed", lambda row: row.of_copy > 0.7
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then time if there is a GPU; the exit code is 1 if a kernel is wrong."""
    args = parser().parse_args(argv)
    try:
        check_compiler()
    except UsageError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return error.exit_code
    ops = [OPS[name] for name in args.op]
    device = torch.device("cuda" if GPU else "cpu")
    if not GPU:
        print("no GPU here: kernels are checked in Triton's interpreter, nothing is timed", flush=True)
    every = {op: [case for case in op.cases if args.all or GPU or not case.slow] for op in ops}
    if failures := [line for op, cases in every.items() for line in check(op, cases, device)]:
        print("\n".join(failures), file=sys.stderr)
        return 1
    if not GPU:
        left = "" if args.all else "; --all checks the largest too"
        print(f"{sum(map(len, every.values()))} cases of {len(ops)} kernels equal their references{left}")
        return 0
    stem = args.output or RESULTS / f"kernels-{slug(torch.cuda.get_device_name())}"
    return int(not all(row.kernel_us for row in time_all(ops, device, measure_limits(), time_us, stem)))


def time_all(ops: Iterable[Op], device: torch.device, limits: Limits, clock: Clock, stem: Path) -> list[Row]:
    """Time every deployed case, print the rows as they come, and write both files."""
    print(heading(limits), flush=True)
    rows = []
    for op in ops:
        for case in op.deployed:
            rows.append(measure(op, case, device, limits, clock))
            print(rows[-1].markdown(), flush=True)
    print("\n".join(verdicts(rows)))
    write(stem, limits, rows)
    return rows


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--op", nargs="+", choices=sorted(OPS), default=sorted(OPS), help="default: all")
    p.add_argument("--all", action="store_true", help="without a GPU, too, check the largest cases (minutes)")
    p.add_argument("-o", "--output", type=Path, help="results without suffix (default: by the GPU's name)")
    return p


def check(op: Op, cases: Iterable[Case], device: torch.device) -> Iterator[str]:
    """Run cases and yield a line for each error above its tolerance."""
    for case in cases:
        for name, error in errors(op, case, device).items():
            if not error <= case.tolerance:
                yield f"{op.name} {case}: {name} has error {error:.1e}, at most {case.tolerance:.0e}"


def measure(op: Op, case: Case, device: torch.device, limits: Limits, clock: Clock) -> Row:
    """Check one deployed case at its size, then time the kernel, eager PyTorch and compiled PyTorch."""
    error = max(errors(op, case, device).values())
    if not error <= case.tolerance:
        return Row(op.name, str(case), error, case.tolerance)
    inputs = on_device(op.inputs(case.shape, case.dtype, 0), device)
    plan = op.plan(case.shape, case.dtype, architecture(device))
    buffers = kernel_buffers(op, plan, op.prepare(inputs))
    times = clock(lambda: launch(op, plan, buffers))
    baseline = op.baseline or op.reference
    typed = {name: in_type(value, DTYPES[case.dtype]) for name, value in inputs.items()}
    torch.compiler.reset()  # otherwise the sizes become symbolic after an earlier shape
    compiled = torch.compile(baseline, dynamic=False)
    cost = op.cost(case.shape, case.dtype)
    rate, flops = cost.bytes / times[0] * 1e6, cost.flops / times[0] * 1e6
    return Row(
        op.name, str(case), error, case.tolerance, times,
        time_or_reason(lambda: baseline(**typed), clock), time_or_reason(lambda: compiled(**typed), clock),
        rate, flops, rate / limits.bytes_per_s, flops / limits.flops_per_s,
    )  # fmt: skip


def in_type(value: Any, dtype: torch.dtype) -> Any:
    """Convert floating-point tensors to the case's type; other values stay."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def time_or_reason(function: Callable[[], object], clock: Clock) -> float | str:
    """Return the median, or the reason why PyTorch fails, such as memory or an unsupported type."""
    try:
        return clock(function)[0]
    except Exception as error:  # of any library below; the kernel's own time stands
        return f"{type(error).__name__}: {' '.join(str(error).split()):.60}".replace("|", "/")


def time_us(function: Callable[[], object]) -> Times:
    """Return microseconds at QUANTILES over RUNS, with the L2 cache flushed before each run.

    The call is replayed from a CUDA graph, unless it waits for the device, which a graph cannot capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.synchronize()
    call = function
    if not waits(function):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
        call = graph.replay
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) * 1e3 for start, end in events], dtype=torch.float64)
    return tuple(torch.quantile(times, q).item() for q in QUANTILES)


def waits(function: Callable[[], object]) -> bool:
    """Return True if a call waits for the device, as reading back a value does."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def measure_limits() -> Limits:
    """Measure the copy and the matrix rate in the same way as the kernels."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = time_us(lambda: target.copy_(source))[0]
    side = 8192
    a = torch.randn(side, side, dtype=torch.float16, device="cuda")
    product = time_us(lambda: torch.mm(a, a))[0]
    return Limits(2 * source.numel() / copy * 1e6, 2 * side**3 / product * 1e6)


def heading(limits: Limits) -> str:
    """Return the text above the table."""
    return "\n".join(
        (
            "# Kernels on a GPU\n",
            f"{origin_line()} GPU: {gpu_name()}.\n",
            f"Measured limits: copy {limits.bytes_per_s / 1e12:.2f} TB/s, fp16 matrix product "
            f"{limits.flops_per_s / 1e12:.0f} TFLOP/s.\n",
            f"| {' | '.join(COLUMNS)} |",
            "| --- " * len(COLUMNS) + "|",
        )
    )


def gpu_name() -> str:
    """Return the device with CUDA's and Triton's version; the machine's line has PyTorch's."""
    import triton

    name = torch.cuda.get_device_name() if GPU else "no GPU"
    return f"{name}, CUDA {torch.version.cuda}, Triton {triton.__version__}"


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the goals with their outcome, and the cases in which PyTorch is faster."""
    timed: Mapping[tuple[str, str], Row] = {(row.op, row.case): row for row in rows if row.kernel_us}
    yield "\n| target | met |\n| --- | --- |"
    for goal in GOALS:
        row = timed.get((goal.op, goal.case))
        met = "not measured" if row is None else "yes" if goal.met(row) else "no"
        yield f"| {goal.op} {goal.case} {goal.text} | {met} |"
    slower = [f"{row.op} {row.case}" for row in timed.values() if row.kernel_us[0] > row.fastest_of_pytorch]
    met = "not measured" if not timed else "no: " + ", ".join(slower) if slower else "yes"
    yield f"| none slower than PyTorch's own | {met} |"


def write(stem: Path, limits: Limits, rows: Sequence[Row]) -> None:
    """Write the table as Markdown and all numbers as JSON."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    lines = [heading(limits), *(row.markdown() for row in rows), *verdicts(rows)]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    content = {"gpu": gpu_name(), "machine": machine(), "limits": asdict(limits)}
    content["rows"] = [asdict(row) for row in rows]
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def slug(name: str) -> str:
    """Return a GPU's name as part of a file name: "NVIDIA H200" becomes "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
