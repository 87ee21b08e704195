"""Write benchmarks/results/kernels.md: registers, shared memory and spills of each compiled kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from moesr.kernels.registry import OPS
from moesr.runtime.devices.operator_plan import KernelIndex, KernelTarget

HEAD = """# Compiled kernels

Written by `python -m moesr.kernels.build -o DIR --report benchmarks/results/kernels.md`, Triton {triton},
without a GPU. The cells of an architecture are registers per thread / dynamic shared memory per block in
KiB / bytes spilled per thread (the larger of stores and loads). "threads" is the size of a block, "mma"
counts tensor-core instructions, and "local" counts loads and stores of local memory inside loops, summed over
the architectures. The build also writes PTX of sm_89, which the driver compiles for later architectures.
"""


def write_report(index: KernelIndex, path: Path) -> None:
    """Write the table of all kernels in an index."""
    cases = _cases(index)
    targets = list(index.architectures)
    lines = [HEAD.format(triton=index.triton)]
    for op in index.sources or {}:
        lines.append(f"\n## {op}\n\nA test holds spills to {OPS[op].max_spill_bytes} bytes.\n")
        lines.append(f"| launch | cases | threads | {' | '.join(targets)} | mma | local |")
        lines.append("| --- " * (5 + len(targets)) + "|")
        rows: dict[tuple[str, str], dict[str, KernelTarget]] = defaultdict(dict)
        for name, kernel in index.kernels.items():
            if kernel.op == op:  # architectures with tilings of their own share a row
                rows[kernel.function, cases[name]].update(kernel.targets)
        lines += [_row(*row, compiled, targets) for row, compiled in sorted(rows.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _cases(index: KernelIndex) -> dict[str, str]:
    """The cases that use each kernel, such as "decoder512 fp16, bf16"."""
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


def _row(function: str, cases: str, compiled: Mapping[str, KernelTarget], targets: Sequence[str]) -> str:
    def cell(target: str) -> str:
        if target not in compiled:
            return "-"
        c = compiled[target]
        return f"{c.registers} / {c.shared_bytes / 1024:.1f} / {c.spill_bytes}"

    mine = [compiled[t] for t in targets if t in compiled]
    threads = "/".join(map(str, sorted({c.threads for c in mine})))
    mma = "/".join(map(str, sorted({c.tensor_core for c in mine})))
    local = sum(c.local_in_loops for c in mine)
    columns = [function, cases, threads, *map(cell, targets), mma, str(local)]
    return f"| {' | '.join(columns)} |"
