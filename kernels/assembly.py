"""Reads registers, spills and instruction counts of compiled kernels from the assembler's output."""

from __future__ import annotations

import re
import subprocess
import sys
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Matrix products on tensor cores: mma (sm_80 to sm_89, sm_120), wgmma (sm_90), tcgen05 (sm_100).
TENSOR_CORE = re.compile(r"\b(?:HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA|OMMA|QMMA)\b")
_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s.*?`?\(?(0x[0-9a-f]+|\.L_x_\d+)")
_BARRIER = re.compile(r"\bBAR\.(?:SYNC|RED)\b")
_LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """The resources that one compiled kernel takes of a multiprocessor, and counts of its instructions."""

    registers: int  # per thread
    shared_bytes: int  # dynamic shared memory per block
    spill_bytes: int  # per thread, the larger of stores and loads
    tensor_core: int = 0  # tensor-core instructions
    local_in_loops: int = 0  # loads and stores of local memory inside loops
    barriers: int = 0  # barriers of the block
    instructions: int = 0  # all instructions

    def as_dict(self) -> dict[str, int]:
        """Return the fields as `KernelTarget` takes them."""
        return asdict(self)


def from_log(log: str, shared_bytes: int) -> Resources:
    """Read the output of `ptxas -v`; ValueError if it has no registers or spills."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise ValueError(f"ptxas -v reported neither registers nor spills: {log!r}")
    return Resources(int(registers[1]), shared_bytes, max(int(spills[1]), int(spills[2])))


def with_instructions(resources: Resources, sass: str) -> Resources:
    """Add the counts of a kernel's disassembly."""
    texts = [m[2] for m in _ADDRESS.finditer(sass)]
    return replace(
        resources,
        tensor_core=len(TENSOR_CORE.findall(sass)),
        local_in_loops=_local_in_loops(sass),
        barriers=sum(bool(_BARRIER.search(text)) for text in texts),
        instructions=sum(not text.startswith("NOP") for text in texts),
    )


def disassemble(cubin: Path) -> str:
    """Return the SASS of a cubin, from the nvdisasm in Triton's wheel."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("nvdisasm.exe" if sys.platform == "win32" else "nvdisasm")
    done = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True)
    return done.stdout


def loops(sass: str) -> list[list[str]]:
    """Return the instructions of each loop, from the target of a backward branch to the branch."""
    texts = [m[2] for m in _ADDRESS.finditer(sass)]
    return [[texts[i] for i in each] for each in _loop_ranges(sass)]


def _local_in_loops(sass: str) -> int:
    """Count local loads and stores inside loops; those in nested loops count once."""
    texts = [m[2] for m in _ADDRESS.finditer(sass)]
    inside = {i for each in _loop_ranges(sass) for i in each}
    return sum(bool(re.search(r"\b(?:LDL|STL)\b", texts[i])) for i in inside)


def _loop_ranges(sass: str) -> list[range]:
    """Return the indices of each loop's instructions among all instructions."""
    places = [(m.start(), m[2]) for m in _ADDRESS.finditer(sass)]
    labels = {m[1]: m.start() for m in _LABEL.finditer(sass)}
    starts = [at for at, _ in places]
    found = []
    for index, (at, text) in enumerate(places):
        branch = _BRANCH.search(text)
        if not branch or labels.get(branch[1], at) >= at:
            continue
        first = bisect_left(starts, labels[branch[1]])
        if first < index:  # the final branch to itself pads the code
            found.append(range(first, index + 1))
    return found
