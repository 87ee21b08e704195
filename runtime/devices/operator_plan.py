"""The contents of `kernels.json`: kernels compiled ahead of time, and the plans for launching them.

An operator plan describes one operator at one shape and data type: its buffers, its scalars and its launches
in order. The build (`moesr.kernels.build`) writes these dataclasses as JSON, and the runtime reads them back.
`docs/kernels-format.schema.json` describes the file for validators.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from moesr.runtime.devices.grid_expressions import MAX_LENGTH, evaluate
from moesr.runtime.engine.field_types import MAX_BYTES, MAX_COUNT, Index, RelativePath, Sha256, Text
from moesr.runtime.system.json_dataclass import Form, Range

SCHEMA = 3

SIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "i64": 8, "i32": 4, "u16": 2, "u8": 1}
"""Bytes per element, by data type."""

ROLES = ("input", "table", "scratch", "output", "state")
"""Roles of a buffer: weights are inputs, a table holds constants, a state is read and written."""

Scalar = int | float

DataType = Annotated[str, Form("|".join(SIZES), f"one of {', '.join(SIZES)}")]
Name = Annotated[str, Form(r"[A-Za-z_][\w.]{0,199}", "a name of letters, digits, dots and underscores")]
Expression = Annotated[str, Form(rf"[\w+\-*/(), ]{{1,{MAX_LENGTH}}}", "an expression of numbers and names")]
Target = Annotated[str, Form(r"sm_[0-9]{2,3}|ptx", "an architecture such as sm_90, or ptx")]
Argument = Annotated[
    str, Form(rf"\*({'|'.join(SIZES)})|i32|fp32", "i32, fp32, or a star and the data type of a pointer")
]
ToolkitVersion = Annotated[str, Form(r"([0-9]{2,3}\.[0-9]{1,2})?", "a CUDA release such as 12.8")]
Integer = Annotated[int, Range(-(2**31), 2**31 - 1)]
Number = Annotated[float, Range(-1e38, 1e38)]


@dataclass(frozen=True)
class KernelTarget:
    """A kernel compiled for one architecture.

    `hidden` names pointer parameters that follow the kernel's arguments, with the bytes of scratch memory
    that each needs per program. Only 0 is supported: a null pointer is passed.
    """

    file: RelativePath
    sha256: Sha256
    entry: Name  # name of the function in the file
    threads: Annotated[int, Range(1, 1024)]  # per block
    shared_bytes: Annotated[int, Range(0, 1 << 20)]  # dynamic shared memory per block
    hidden: dict[str, Annotated[int, Range(0, 0, "0, since scratch memory of a kernel is not supported")]]
    registers: Index = 0  # per thread
    spill_bytes: Index = 0  # per thread, the larger of stores and loads
    tensor_core: Index = 0  # number of tensor-core instructions
    local_in_loops: Index = 0  # number of loads and stores of local memory inside loops
    barriers: Index = 0  # number of barriers of the block
    instructions: Index = 0  # number of all instructions


@dataclass(frozen=True)
class CompiledKernel:
    """One function at fixed argument types and constants, compiled for all architectures in `targets`.

    `arguments` are "*fp16" for a pointer (or another data type after the star), "i32" or "fp32".
    """

    op: Name
    function: Name
    arguments: tuple[Argument, ...]
    constants: dict[str, int | float | bool | str]
    targets: dict[Target, KernelTarget]


@dataclass(frozen=True)
class PlanBuffer:
    """A dense, row-major, 16-byte aligned buffer. Its shape may be expressions over the plan's scalars."""

    name: Name
    dtype: DataType  # a key of SIZES
    shape: tuple[Annotated[int, Range(0, MAX_COUNT)] | Expression, ...]
    role: Annotated[str, Form("|".join(ROLES), f"one of {', '.join(ROLES)}")]
    file: RelativePath | None = None  # for a table: the file that holds its bytes
    sha256: Sha256 | None = None  # hash of that file

    def __post_init__(self) -> None:
        if self.dtype not in SIZES or self.role not in ROLES:
            raise ValueError(f"buffer {self.name!r}: dtype {self.dtype!r}, role {self.role!r}")
        if (self.file is None) != (self.sha256 is None):
            raise ValueError(f"buffer {self.name!r} has a file without a sha256, or the reverse")

    def dims(self, scalars: Mapping[str, Scalar]) -> tuple[int, ...]:
        """Return the shape for these scalars."""
        return tuple(evaluate(size, scalars) for size in self.shape)

    def nbytes(self, scalars: Mapping[str, Scalar]) -> int:
        """Return the size in bytes for these scalars; ValueError if it is negative or above MAX_BYTES."""
        sizes = self.dims(scalars)
        found = SIZES[self.dtype] * math.prod(sizes)
        if min(sizes, default=0) < 0 or found > MAX_BYTES:
            raise ValueError(f"buffer {self.name!r} cannot have the shape {sizes}")
        return found


@dataclass(frozen=True)
class KernelLaunch:
    """One launch: a kernel, its buffers and scalars by name, and its grid as expressions over the scalars."""

    kernel: Text
    arguments: tuple[Name, ...]
    grid: tuple[Integer | Expression, ...]  # one to three sizes

    def __post_init__(self) -> None:
        if not 1 <= len(self.grid) <= 3:
            raise ValueError(f"the grid of {self.kernel!r} has {len(self.grid)} sizes, expected 1 to 3")


@dataclass(frozen=True)
class OperatorPlan:
    """An operator at one shape and data type, for the architectures in `targets`."""

    op: Name
    dtype: DataType
    shape: dict[str, Index]
    scalars: dict[str, Integer | Number]  # at this shape; integers are int32 arguments, floats float32
    buffers: tuple[PlanBuffer, ...]
    launches: tuple[KernelLaunch, ...]
    targets: tuple[Target, ...] = ()
    case: Text = ""  # name of the shape, for readers


@dataclass(frozen=True)
class KernelIndex:
    """All contents of a `kernels.json`."""

    schema: int
    kernels: dict[str, CompiledKernel]
    plans: tuple[OperatorPlan, ...]
    triton: Text = ""  # version of the compiler
    toolkit: ToolkitVersion = ""  # the CUDA release of the assembler
    alignment: Annotated[int, Range(16, 16)] = 16  # alignment of each buffer, in bytes
    architectures: tuple[Target, ...] = ()
    sources: dict[str, Sha256] | None = None  # hash of the code in each operator's kernel.py

    def __post_init__(self) -> None:
        """Raise ValueError if a plan launches a kernel that is missing, or with wrong arguments."""
        for plan in self.plans:
            named = {buffer.name for buffer in plan.buffers} | plan.scalars.keys()
            for launch in plan.launches:
                kernel = self.kernels.get(launch.kernel)
                if kernel is None or len(kernel.arguments) != len(launch.arguments):
                    raise ValueError(
                        f"plan of {plan.op!r}: there is no kernel {launch.kernel!r} with these arguments"
                    )
                if unknown := {*launch.arguments} - named:
                    raise ValueError(f"plan of {plan.op!r}: there is no buffer or scalar {min(unknown)!r}")
            if not plan.launches:
                raise ValueError(f"plan of {plan.op!r} has no launches")

    def to_json(self) -> str:
        """Return the text of the file, with its own hash; entries that are None are left out."""
        values = dataclasses.asdict(self, dict_factory=_without_none)
        return json.dumps(values | {"sha256": digest(values)}, indent=1) + "\n"


def digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the values of a kernels.json, except `sha256`, in any order and spacing."""
    rest = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _without_none(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in entries if value is not None}
