"""Write benchmarks/results/kernels.md: registers, shared memory and spills of each compiled kernel."""

from __future__ import annotations

import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from moesr.kernels.registry import OPS
from moesr.runtime.devices.operator_plan import KernelIndex, KernelTarget
from moesr.runtime.system import cpu

ORIGIN = (
    "Command: `python -m moesr.kernels.build -o DIR --report benchmarks/results/kernels.md`. "
    "Commit: {commit}. Machine: {machine}, Triton {triton}, no GPU."
)

HEAD = """# Compiled kernels

{origin}

The cells of an architecture are registers per thread / dynamic shared memory per block in KiB / bytes spilled
per thread (the larger of stores and loads). "threads" is the size of a block, and "mma" counts tensor-core
instructions. "barriers" and "instructions" are counts of the whole kernel on {counted}. "local" counts loads
and stores of local memory inside loops, summed over the architectures. The build also writes PTX of sm_89,
which the driver compiles for later architectures.
"""

COUNTED = "sm_90"  # the architecture whose barriers and instructions are shown, if it was built
KEPT = "\n## Changes"  # everything from this heading on is written by hand and kept


def write_report(index: KernelIndex, path: Path) -> None:
    """Write the table of all kernels in an index, before the hand-written part of an existing page."""
    cases, targets = _cases(index), list(index.architectures)
    counted = COUNTED if COUNTED in targets else targets[-1]
    machine = f"{cpu.model()}, Python {platform.python_version()}"
    origin = ORIGIN.format(commit=_commit(), machine=machine, triton=index.triton)
    lines = [HEAD.format(origin=origin, counted=counted)]
    head = ["launch", "cases", "threads", *targets, "mma", "barriers", "instructions", "local"]
    for op in index.sources or {}:
        lines.append(f"\n## {op}\n\nA test holds spills to {OPS[op].max_spill_bytes} bytes.\n")
        lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        rows: dict[tuple[str, str], dict[str, KernelTarget]] = defaultdict(dict)
        for name, kernel in index.kernels.items():
            if kernel.op == op:  # architectures with tilings of their own share a row
                rows[kernel.function, cases[name]].update(kernel.targets)
        lines += [_row(*row, compiled, targets, counted) for row, compiled in sorted(rows.items())]
    before = path.read_text() if path.is_file() else ""
    kept = before[before.index(KEPT) :] if KEPT in before else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n" + kept)


def _commit() -> str:
    """Return the commit of the code that compiled, with "+" after it if files have changed since."""
    try:
        return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cases(index: KernelIndex) -> dict[str, str]:
    """Return the cases that use each kernel, such as "decoder512 fp16, bf16"."""
    used: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for plan in index.plans:
        for launch in plan.launches:
            dtypes = used[launch.kernel][plan.case]
            if plan.dtype not in dtypes:
                dtypes.append(plan.dtype)
    return {
        kernel: "; ".join(f"{case} {', '.join(dtypes)}" for case, dtypes in by_case.items())
        for kernel, by_case in used.items()
    }


def _row(
    function: str, cases: str, compiled: Mapping[str, KernelTarget], targets: Sequence[str], counted: str
) -> str:
    def cell(target: str) -> str:
        if target not in compiled:
            return "-"
        c = compiled[target]
        return f"{c.registers} / {c.shared_bytes / 1024:.1f} / {c.spill_bytes}"

    mine = [compiled[t] for t in targets if t in compiled]
    threads = "/".join(map(str, sorted({c.threads for c in mine})))
    mma = "/".join(map(str, sorted({c.tensor_core for c in mine})))
    shown = compiled.get(counted)
    counts = [str(shown.barriers), str(shown.instructions)] if shown else ["-", "-"]
    local = sum(c.local_in_loops for c in mine)
    return f"| {' | '.join([function, cases, threads, *map(cell, targets), mma, *counts, str(local)])} |"
