"""What an operator is made of, without torch or triton: buffers, launches, cases and costs.

A `Plan` is an operator at one shape, type and architecture: the launches in order and the buffers between
them. The tests and PyTorch run it with the just-in-time compiler, `moesr.kernels.build` compiles it ahead
of time and writes it into `kernels.json`: both read the same plan.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from moesr.runtime.devices.grid_expressions import evaluate
from moesr.runtime.errors import UsageError

Shape = Mapping[str, int]
Scalar = int | float

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "i64": 8, "i32": 4, "u16": 2, "u8": 1}
# Shared memory that one block of threads may take, by compute capability (CUDA programming guide).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ROLES = ("input", "table", "scratch", "output", "state")


def check_compiler() -> None:
    """UsageError where kernels cannot be compiled or interpreted."""
    if importlib.util.find_spec("triton") is None:
        raise UsageError(
            "kernels are compiled with triton, which is not installed; install it with: "
            "pip install 'moesr[kernels]'"
        )


@dataclass(frozen=True)
class Buffer:
    """Memory that launches name: dense, row-major, 16-byte aligned."""

    name: str
    dtype: str  # a key of SIZES
    shape: tuple[int | str, ...]  # expressions may use the plan's scalars
    role: str  # "input" (weights too), "table", "scratch", "output", "state" (read and written)

    def __post_init__(self) -> None:
        if self.dtype not in SIZES or self.role not in ROLES:
            raise ValueError(f"buffer {self.name!r}: dtype {self.dtype!r}, role {self.role!r}")


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton function: its run-time parameters come first, constexpr ones after them."""

    function: str  # name in the operator's kernel.py
    arguments: tuple[str, ...]  # buffers and scalars in the order of the function's parameters
    constants: Mapping[str, int | float | bool | str]
    grid: tuple[
        str, ...
    ]  # one to three expressions over scalars and constants, such as "cdiv(pixels, BLOCK)"
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True  # False: a * b + c rounds twice, as NumPy does


@dataclass(frozen=True, eq=False)
class Plan:
    """Launches in order. Scalars are int32 (int) or float32 (float) arguments with this plan's values."""

    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    tables: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # float64 or integers, by buffer name

    def __post_init__(self) -> None:
        known = {b.name for b in self.buffers} | set(self.scalars)
        for launch in self.launches:
            if missing := [a for a in launch.arguments if a not in known]:
                raise ValueError(f"{launch.function}: arguments {missing} are neither buffers nor scalars")

    def type_of(self, argument: str) -> str:
        """Triton's name of an argument's type: "*fp16", "i32", "fp32"."""
        for buffer in self.buffers:
            if buffer.name == argument:
                return f"*{buffer.dtype}"
        return "i32" if isinstance(self.scalars[argument], int) else "fp32"

    def grid(self, launch: Launch) -> tuple[int, ...]:
        """The grid of a launch at this plan's scalars."""
        names = {**self.scalars, **launch.constants}
        return tuple(evaluate(e, names) for e in launch.grid)

    def dims(self, buffer: Buffer) -> tuple[int, ...]:
        """The shape of a buffer at this plan's scalars."""
        return tuple(evaluate(str(d), self.scalars) for d in buffer.shape)

    def with_role(self, *roles: str) -> tuple[Buffer, ...]:
        """The buffers that have one of the roles, in order."""
        return tuple(b for b in self.buffers if b.role in roles)


@dataclass(frozen=True)
class Case:
    """One shape and type to check: the error is RMS(got - want) / RMS(want), want in float64."""

    name: str
    shape: Shape
    dtype: str
    tolerance: float  # integers: the share of values that may differ
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


@dataclass(frozen=True)
class Cost:
    """What an operator must do at least, of memory traffic and arithmetic."""

    bytes: float  # inputs read once, outputs written once, and what its passes cannot avoid
    flops: float  # of the matrix products that it runs; 0 where memory alone decides


@dataclass(frozen=True, eq=False)
class Op:
    """A row of the registry. `inputs` are what the reference takes; `prepare` packs them for the kernels."""

    name: str  # its folder, too
    plan: Callable[[Shape, str, int], Plan]  # shape, dtype, architecture
    inputs: Callable[[Shape, str, int], dict[str, Any]]  # shape, dtype, seed -> CPU tensors by name
    reference: Callable[..., Mapping[str, Any]]  # the inputs by name, floats as float64 -> outputs by name
    cases: tuple[Case, ...]  # what the tests run
    deployed: tuple[Case, ...]  # what is compiled ahead of time and timed
    cost: Callable[[Shape, str], Cost]
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict  # inputs -> the plan's input buffers
    baseline: Callable[..., Any] | None = (
        None  # what PyTorch runs; default: the reference, in the case's type
    )
    max_spill_bytes: int = 0  # of one thread's registers, stores and loads each
    link: Callable[[dict[str, Any]], None] | None = (
        None  # writes addresses of buffers into int64 input tables
    )


def cases(
    shapes: Mapping[str, Shape], tolerances: Mapping[str, float], slow: frozenset[str] = frozenset()
) -> tuple[Case, ...]:
    """Every shape in every type; `slow` names shapes that the default tests leave out."""
    return tuple(
        Case(name, shape, dtype, tolerance, name in slow)
        for name, shape in shapes.items()
        for dtype, tolerance in tolerances.items()
    )


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
