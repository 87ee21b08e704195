"""Descriptions of operators without torch or triton: plans, test cases and costs.

A plan (`TritonPlan`) describes one operator at one shape, data type and architecture: its buffers, its
scalars and its launches in order. It is an `OperatorPlan`, as the runtime reads it from `kernels.json`, whose
launches name functions that are still to be compiled. PyTorch and the tests run plans with Triton's
just-in-time compiler; `moesr.kernels.build` compiles the same plans ahead of time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from moesr.runtime.devices.grid_expressions import evaluate
from moesr.runtime.devices.operator_plan import SIZES, KernelLaunch, OperatorPlan, PlanBuffer, Scalar
from moesr.runtime.errors import UsageError

__all__ = [
    "ARCHITECTURES",
    "MULTIPROCESSORS",
    "SHARED_BYTES",
    "SIZES",
    "Case",
    "Cost",
    "Op",
    "PlanBuffer",
    "Scalar",
    "Shape",
    "TritonLaunch",
    "TritonPlan",
    "cases",
    "cdiv",
    "check_compiler",
    "next_power_of_2",
]

Shape = Mapping[str, int]

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that kernels are compiled for, as two or three digits."""

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one block of threads may use, by architecture (CUDA programming guide)."""

MULTIPROCESSORS = {80: 108, 86: 84, 89: 144, 90: 132, 100: 148, 120: 188}
"""Multiprocessors of a large GPU of each architecture: A100, RTX 3090 Ti, AD102, H200, B200, RTX PRO 6000."""


def check_compiler() -> None:
    """Raise UsageError if Triton, which compiles and interprets the kernels, is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise UsageError(
            "kernels are compiled with triton, which is not installed; install it with: "
            "pip install 'moesr[kernels]'"
        )


@dataclass(frozen=True)
class TritonLaunch(KernelLaunch):
    """A launch of a function that is not compiled yet: `kernel` is its name in the operator's `kernel.py`.

    The function takes `arguments` first and then `constants`, which are its constexpr parameters. The grid's
    expressions may use the constants too.
    """

    constants: Mapping[str, int | float | bool | str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True  # False: a * b + c is rounded twice, as in NumPy

    @property
    def function(self) -> str:
        """Name of the function in the operator's `kernel.py`."""
        return self.kernel


@dataclass(frozen=True, eq=False)
class TritonPlan(OperatorPlan):
    """A plan before compilation, with the values of its tables (float64 or integers, by buffer name)."""

    launches: tuple[TritonLaunch, ...]
    tables: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {b.name for b in self.buffers} | set(self.scalars)
        for launch in self.launches:
            if missing := [a for a in launch.arguments if a not in known]:
                raise ValueError(f"{launch.function}: arguments {missing} are neither buffers nor scalars")

    def type_of(self, argument: str) -> str:
        """Triton's name for the type of an argument: "*fp16", "i32" or "fp32"."""
        for buffer in self.buffers:
            if buffer.name == argument:
                return f"*{buffer.dtype}"
        return "i32" if isinstance(self.scalars[argument], int) else "fp32"

    def grid(self, launch: TritonLaunch) -> tuple[int, ...]:
        """Return the grid of a launch at this plan's scalars."""
        names = {**self.scalars, **launch.constants}
        return tuple(evaluate(e, names) for e in launch.grid)

    def with_role(self, *roles: str) -> tuple[PlanBuffer, ...]:
        """Return the buffers that have one of the roles, in order."""
        return tuple(b for b in self.buffers if b.role in roles)


@dataclass(frozen=True)
class Case:
    """A shape and a data type to check, with the largest accepted error.

    The error is the RMS of the difference from the reference, which runs in float64, over the RMS of the
    reference. For integers it is the share of values that differ.
    """

    name: str
    shape: Shape
    dtype: str
    tolerance: float
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


@dataclass(frozen=True)
class Cost:
    """The least memory traffic and arithmetic of an operator."""

    bytes: float  # inputs read once, outputs written once, and the traffic between launches
    flops: float  # of the matrix products that the kernels run; 0 if memory alone limits the operator


@dataclass(frozen=True, eq=False)
class Op:
    """One row of the registry: an operator with its plans, its reference, its test cases and its cost."""

    name: str  # also the name of its folder
    plan: Callable[[Shape, str, int], TritonPlan]  # shape, dtype, architecture; ValueError: no plan
    inputs: Callable[[Shape, str, int], dict[str, Any]]  # shape, dtype, seed -> the reference's arguments
    reference: Callable[..., Mapping[str, Any]]  # those arguments, floats as float64 -> outputs by name
    cases: tuple[Case, ...]  # run by the tests
    deployed: tuple[Case, ...]  # compiled ahead of time and timed
    cost: Callable[[Shape, str], Cost]
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict  # arguments -> the plan's inputs
    baseline: Callable[..., Any] | None = None  # PyTorch's own form to time; None: the reference
    max_spill_bytes: int = 0  # accepted register spills per thread, stores and loads each
    link: Callable[[dict[str, Any]], None] | None = None  # writes buffer addresses into int64 tables


def cases(
    shapes: Mapping[str, Shape], tolerances: Mapping[str, float], slow: Set[str] = frozenset()
) -> tuple[Case, ...]:
    """Return every shape in every type; `slow` names those that only the slow tests run.

    A name is that of a shape, or of a shape in one type, such as "level-fp32".
    """
    return tuple(
        Case(name, shape, dtype, tolerance, bool({name, f"{name}-{dtype}"} & slow))
        for name, shape in shapes.items()
        for dtype, tolerance in tolerances.items()
    )


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
