"""A graph in parts: plans of a compiler and kernels of ours in turn, with the buffers between them.

`ROLE.parts.json` lists them in order. Values are named; where they lie is decided here, for a number of
tiles: in one block of memory, where values that are needed at different times share their place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime.engine.graph_spec import TensorSpec
from moesr.runtime.errors import EngineError
from moesr.runtime.system import json_dataclass
from moesr.runtime.system.files import reason

SCHEMA = 2
NHWC = ".nhwc"
"""How names of values end that lie in memory with their channels last; their dimensions are those of NCHW."""

VECTOR = 8
"""Such values are of half precision, and their channels a multiple of this."""

SUFFIX = ".parts.json"
ALIGNMENT = 256
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}

Scalar = int | float | str


@dataclass(frozen=True)
class Stored:
    """Type and dimensions of a value, numbers or "B"."""

    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class Constant:
    """A kernel's weights: bytes of the file of constants."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class PlanStep:
    """A graph to compile; the names of its inputs and outputs are those of the values."""

    file: str
    sha256: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class KernelStep:
    """A plan of kernels.json: values and constants by its buffers; scalars are numbers or "B"."""

    op: str
    dtype: str
    shape: dict[str, int]
    inputs: dict[str, str]
    outputs: dict[str, str]
    constants: dict[str, Constant]
    scalars: dict[str, Scalar]


@dataclass(frozen=True)
class PartStep:
    """Either of the two."""

    plan: PlanStep | None = None
    kernel: KernelStep | None = None

    @property
    def taken(self) -> tuple[str, ...]:
        """Names of the values that it reads."""
        if self.plan:
            return self.plan.inputs
        return tuple(self.kernel.inputs.values()) if self.kernel else ()

    @property
    def made(self) -> tuple[str, ...]:
        """Names of the values that it writes."""
        if self.plan:
            return self.plan.outputs
        return tuple(self.kernel.outputs.values()) if self.kernel else ()


@dataclass(frozen=True)
class Parts:
    """All of a graph. `inputs` and `outputs` are the whole's; the others lie between steps."""

    schema: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: dict[str, Stored]
    constants: str | None  # file
    steps: tuple[PartStep, ...]

    @property
    def files(self) -> set[str]:
        """Names of the files of its graphs and constants."""
        graphs = {step.plan.file for step in self.steps if step.plan}
        return graphs | ({self.constants} if self.constants else set())

    def spec(self, name: str) -> TensorSpec:
        """A value as a graph's input or output."""
        return TensorSpec(name, self.values[name].dtype, self.values[name].dims)

    def nbytes(self, name: str, batch: int) -> int:
        """Size of a value for a number of tiles."""
        return math.prod(self.spec(name).shape(batch)) * SIZES[self.values[name].dtype]

    def lives(self) -> dict[str, tuple[int, int]]:
        """First and last step that need each value between steps."""
        outside, found = {*self.inputs, *self.outputs}, dict[str, tuple[int, int]]()
        for at, step in enumerate(self.steps):
            for name in (*step.taken, *step.made):
                if name not in outside:
                    found[name] = found.get(name, (at, at))[0], at
        return found


def read_parts(path: Path) -> Parts:
    """Read a file of parts; EngineError where it is damaged or of another schema."""
    try:
        parts = json_dataclass.build(Parts, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: {reason(error)}; export the engine again") from error
    if parts.schema != SCHEMA:
        raise EngineError(f"{path}: schema {parts.schema}, expected {SCHEMA}; export the engine again")
    there = {*parts.inputs}
    for step in parts.steps:
        if missing := {*step.taken} - there:
            raise EngineError(f"{path}: nothing makes {', '.join(sorted(missing))}; export the engine again")
        there |= {*step.made}
    return parts


def layout(sizes: Mapping[str, int], lives: Mapping[str, tuple[int, int]]) -> tuple[dict[str, int], int]:
    """Where each value begins in one block, and the block's size; what lives at one time never overlaps.

    `sizes` in bytes; `lives` are first and last step. The largest values come first.
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
