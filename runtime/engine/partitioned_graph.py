"""A graph in parts: subgraphs for a compiler alternate with our own kernels, and values pass between them.

`ROLE.parts.json` lists the steps in order (`docs/parts-format.schema.json`). Values have names; `layout`
places them for a given number of tiles in one block of memory, in which values that are needed at different
times may overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moesr.runtime.engine.field_types import MAX_BYTES, Bytes, Dimension, FileName, Index, Sha256, Text
from moesr.runtime.engine.graph_spec import Boundary, TensorSpec
from moesr.runtime.errors import EngineError
from moesr.runtime.system import json_dataclass
from moesr.runtime.system.files import reason
from moesr.runtime.system.json_dataclass import Form, Range

SCHEMA = 2
NHWC = ".nhwc"
"""Values whose names have this suffix lie in memory with channels last; their dims are still NCHW."""

VECTOR = 8
"""The channels of such values are a multiple of this number; their type is a 16-bit float."""

SUFFIX = ".parts.json"
ALIGNMENT = 256
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}

Scalar = (
    Annotated[int, Range(-(2**31), 2**31 - 1)]
    | Annotated[float, Range(-1e38, 1e38)]
    | Annotated[str, Form("B", "B")]
)


@dataclass(frozen=True)
class Stored:
    """The element type and the dimensions of a value; a dimension is a number or "B"."""

    dtype: Annotated[str, Form("|".join(SIZES), f"one of {', '.join(SIZES)}")]
    dims: tuple[Dimension, ...]


@dataclass(frozen=True)
class Constant:
    """The weights of a kernel: a range of bytes in the file of constants."""

    offset: Bytes
    nbytes: Bytes


@dataclass(frozen=True)
class PlanStep:
    """A subgraph to compile. The names of its inputs and outputs are those of the values."""

    file: FileName
    sha256: Sha256
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class KernelStep:
    """An operator plan of kernels.json, with the value or constant of each of its buffers by name.

    A scalar is a number, or "B" for the number of tiles.
    """

    op: Text
    dtype: Text
    shape: dict[str, Index]
    inputs: dict[str, str]
    outputs: dict[str, str]
    constants: dict[str, Constant]
    scalars: dict[str, Scalar]


@dataclass(frozen=True)
class PartStep:
    """One step, which is either a subgraph or a kernel."""

    plan: PlanStep | None = None
    kernel: KernelStep | None = None

    def __post_init__(self) -> None:
        if (self.plan is None) == (self.kernel is None):
            raise ValueError("a step is either a plan or a kernel")

    @property
    def taken(self) -> tuple[str, ...]:
        """Names of the values that the step reads."""
        if self.plan:
            return self.plan.inputs
        return tuple(self.kernel.inputs.values()) if self.kernel else ()

    @property
    def made(self) -> tuple[str, ...]:
        """Names of the values that the step writes."""
        if self.plan:
            return self.plan.outputs
        return tuple(self.kernel.outputs.values()) if self.kernel else ()


@dataclass(frozen=True)
class Parts:
    """The whole graph. `inputs` and `outputs` are those of the graph; all other values lie between steps."""

    schema: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[str, Stored]
    constants: FileName | None  # the file that holds the weights of kernels
    steps: tuple[PartStep, ...]

    @property
    def files(self) -> set[str]:
        """Names of the files of its subgraphs and constants."""
        graphs = {step.plan.file for step in self.steps if step.plan}
        return graphs | ({self.constants} if self.constants else set())

    @property
    def boundary(self) -> Boundary:
        """The inputs and outputs of the graph."""
        return Boundary(tuple(map(self.spec, self.inputs)), tuple(map(self.spec, self.outputs)))

    def spec(self, name: str) -> TensorSpec:
        """Name, type and dimensions of a value, as of an input or output of a graph."""
        return TensorSpec(name, self.values[name].dtype, self.values[name].dims)

    def nbytes(self, name: str, batch: int) -> int:
        """Return the size of a value in bytes for a number of tiles."""
        return math.prod(self.spec(name).shape(batch)) * SIZES[self.values[name].dtype]

    def lives(self) -> dict[str, tuple[int, int]]:
        """Return the first and the last step that need each value between steps."""
        outside, found = {*self.inputs, *self.outputs}, dict[str, tuple[int, int]]()
        for at, step in enumerate(self.steps):
            for name in (*step.taken, *step.made):
                if name not in outside:
                    found[name] = found.get(name, (at, at))[0], at
        return found


def read_parts(path: Path) -> Parts:
    """Read a file of parts; EngineError if it is damaged or has another schema."""
    try:
        values = json_dataclass.read_json(path)
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != SCHEMA or isinstance(schema, bool):
            raise ValueError(f"schema {schema!r:.20}, expected {SCHEMA}")
        parts = json_dataclass.build(Parts, values)
        _check(parts)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: {reason(error)}; export the engine again") from error
    return parts


def _check(parts: Parts) -> None:
    """Raise ValueError if a step uses a value that is not declared or that no earlier step has made."""
    there = {*parts.inputs}
    for step in parts.steps:
        if missing := {*step.taken} - there:
            raise ValueError(f"no earlier step makes {', '.join(sorted(missing))}")
        there |= {*step.made}
    if missing := {*parts.outputs} - there:
        raise ValueError(f"no step makes {', '.join(sorted(missing))}")
    if missing := there - parts.values.keys():
        raise ValueError(f"values lacks {', '.join(sorted(missing))}")
    if any(step.kernel and step.kernel.constants for step in parts.steps) and parts.constants is None:
        raise ValueError("kernels have constants, but there is no file of constants")
    if large := [name for name in parts.values if parts.nbytes(name, 1) > MAX_BYTES]:
        raise ValueError(f"{', '.join(sorted(large))} are larger than allowed")


def layout(sizes: Mapping[str, int], lives: Mapping[str, tuple[int, int]]) -> tuple[dict[str, int], int]:
    """Return the offset of each value in one block, and the size of the block.

    `sizes` are in bytes, `lives` the first and the last step that need a value. Values that are needed at the
    same time never overlap. The largest values are placed first.
    """
    placed: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        first, last = lives[name]
        meets = [other for other in placed if lives[other][0] <= last and first <= lives[other][1]]
        taken = sorted((placed[other], placed[other] + sizes[other]) for other in meets)
        start = 0
        for low, high in taken:
            if start + sizes[name] <= low:
                break
            start = max(start, -(-high // ALIGNMENT) * ALIGNMENT)
        placed[name] = start
    return placed, max((placed[name] + sizes[name] for name in placed), default=0)
