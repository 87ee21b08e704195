"""The contents of `kernels.json`: kernels compiled ahead of time, and the plans that say how to launch them.

An operator plan describes one operator at one shape and data type: its buffers, its scalars and its launches
in order. The build (`moesr.kernels.build`) writes these dataclasses as JSON, and the runtime reads them back.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesr.runtime.devices.grid_expressions import evaluate

SCHEMA = 2

SIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "i64": 8, "i32": 4, "u16": 2, "u8": 1}
"""Bytes per element, by data type."""

ROLES = ("input", "table", "scratch", "output", "state")
"""Roles of a buffer: weights are inputs, a table holds constants, a state is read and written."""

Scalar = int | float


@dataclass(frozen=True)
class KernelTarget:
    """A kernel compiled for one architecture.

    `hidden` names pointer parameters that follow the kernel's arguments, with the bytes that each of them
    must point to (0: a null pointer is passed).
    """

    file: str
    sha256: str
    entry: str  # name of the function in the file
    threads: int  # per block
    shared_bytes: int  # dynamic shared memory per block
    hidden: dict[str, int]
    registers: int = 0  # per thread
    spill_bytes: int = 0  # per thread, the larger of stores and loads
    tensor_core: int = 0  # tensor-core instructions
    local_in_loops: int = 0  # loads and stores of local memory inside loops
    barriers: int = 0  # barriers of the block
    instructions: int = 0  # all instructions


@dataclass(frozen=True)
class CompiledKernel:
    """One function at fixed argument types and constants, compiled for every architecture in `targets`.

    `arguments` are "*fp16" for a pointer (or another data type after the star), "i32" or "fp32".
    """

    op: str
    function: str
    arguments: tuple[str, ...]
    constants: dict[str, Any]
    targets: dict[str, KernelTarget]


@dataclass(frozen=True)
class PlanBuffer:
    """A dense, row-major, 16-byte aligned buffer. Its shape may be expressions over the plan's scalars."""

    name: str
    dtype: str  # a key of SIZES
    shape: tuple[int | str, ...]
    role: str  # one of ROLES
    file: str | None = None  # for a table: the file that holds its bytes

    def __post_init__(self) -> None:
        if self.dtype not in SIZES or self.role not in ROLES:
            raise ValueError(f"buffer {self.name!r}: dtype {self.dtype!r}, role {self.role!r}")

    def dims(self, scalars: Mapping[str, Scalar]) -> tuple[int, ...]:
        """Its shape at these scalars."""
        return tuple(evaluate(size, scalars) for size in self.shape)

    def nbytes(self, scalars: Mapping[str, Scalar]) -> int:
        """Its size in bytes at these scalars."""
        return SIZES[self.dtype] * math.prod(self.dims(scalars))


@dataclass(frozen=True)
class KernelLaunch:
    """One launch: a kernel, its buffers and scalars by name, and its grid as expressions over the scalars."""

    kernel: str
    arguments: tuple[str, ...]
    grid: tuple[int | str, ...]  # one to three sizes


@dataclass(frozen=True)
class OperatorPlan:
    """An operator at one shape and data type, for the architectures in `targets`."""

    op: str
    dtype: str
    shape: dict[str, Any]
    scalars: dict[str, Any]  # values at this shape: an integer is an int32 argument, a float a float32 one
    buffers: tuple[PlanBuffer, ...]
    launches: tuple[KernelLaunch, ...]
    targets: tuple[str, ...] = ()
    case: str = ""  # name of the shape, for readers


@dataclass(frozen=True)
class KernelIndex:
    """Everything that a `kernels.json` holds."""

    schema: int
    kernels: dict[str, CompiledKernel]
    plans: tuple[OperatorPlan, ...]
    triton: str = ""  # version of the compiler
    alignment: int = 16  # of every buffer, in bytes
    architectures: tuple[str, ...] = ()
    sources: dict[str, str] | None = None  # sha256 of each operator's kernel.py

    def to_json(self) -> str:
        """Return the text of the file; entries that are None are left out."""
        return json.dumps(dataclasses.asdict(self, dict_factory=_without_none), indent=1) + "\n"


def _without_none(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in entries if value is not None}
