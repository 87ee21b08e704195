"""Kernels compiled ahead of time: `kernels.json`, which says how to launch them, and the files beside it.

`python -m moesr.kernels.build` writes such a directory; `kernels/README.md` describes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.devices.driver import Driver
from moesr.runtime.devices.grid_expressions import evaluate
from moesr.runtime.devices.operator_plan import (
    SCHEMA,
    CompiledKernel,
    KernelIndex,
    KernelLaunch,
    KernelTarget,
    OperatorPlan,
    PlanBuffer,
    Scalar,
)
from moesr.runtime.errors import EngineError
from moesr.runtime.system import json_dataclass, user_cache
from moesr.runtime.system.files import reason

KERNELS_NAME, KERNELS_FOLDER = "kernels.json", "kernels"
_CACHE_FOLDER = "cubins"
BUILD = "make them with: python -m moesr.kernels.build --arch sm_{0} -o {1}"
_PTX_FROM = 89  # the PTX is that of this architecture


@dataclass(frozen=True)
class BoundLaunch:
    """A loaded kernel with its grid and arguments. Equal launches do the same work."""

    kernel: Any = field(hash=False)  # the driver's
    name: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    arguments: tuple[np.generic, ...]

    def enqueue(self, driver: Driver) -> None:
        """Launch the kernel on the driver's stream."""
        driver.launch(self.kernel, self.grid, self.threads, self.shared_bytes, self.arguments)


class KernelFiles:
    """A directory of kernels, on one GPU; a kernel is loaded when it is first bound."""

    def __init__(self, directory: Path, driver: Driver) -> None:
        """EngineError where there is no such directory, it is damaged, or was made for other GPUs."""
        self._directory, self._driver = directory, driver
        self._content = read(directory)
        self._loaded: dict[str, tuple[Any, KernelTarget, list[Any]]] = {}
        self._bound: dict[Any, BoundLaunch] = {}
        self._check_architecture()

    @property
    def architecture(self) -> str:
        """The architecture that the kernels used here were compiled for."""
        return self._target(next(iter(self._content.kernels.values())))

    def plan(self, op: str, dtype: str, shape: Mapping[str, int]) -> OperatorPlan:
        """The plan of an operator that has all of `shape`; EngineError where there is none for this GPU."""
        for plan in self._content.plans:
            same = all(plan.shape.get(name, 0) == value for name, value in shape.items())
            named = plan.op == op and plan.dtype == dtype and same
            if named and self._target(self._content.kernels[plan.launches[0].kernel]) in plan.targets:
                return plan
        sizes = ", ".join(f"{name} {value}" for name, value in shape.items())
        raise EngineError(f"{self._directory}: no {dtype} kernel of {op} with {sizes}; {self._cure()}")

    def bind(
        self, step: KernelLaunch, buffers: Mapping[str, int], scalars: Mapping[str, Scalar]
    ) -> BoundLaunch:
        """A launch between buffers, given by their addresses; the same one for the same values."""
        key = step, tuple(buffers.values()), tuple(scalars.values())
        if key not in self._bound:
            self._bound[key] = self._bind(step, buffers, scalars)
        return self._bound[key]

    def _bind(
        self, step: KernelLaunch, buffers: Mapping[str, int], scalars: Mapping[str, Scalar]
    ) -> BoundLaunch:
        kernel, target, scratch = self._load(step.kernel)
        types, given = self._content.kernels[step.kernel].arguments, {**scalars, **buffers}
        visible = [_argument(kind, given[name]) for kind, name in zip(types, step.arguments, strict=True)]
        hidden = [np.uint64(block.address if block else 0) for block in scratch]
        grid = [evaluate(size, scalars) for size in step.grid]
        grid += [1] * (3 - len(grid))
        arguments = (*visible, *hidden)
        return BoundLaunch(kernel, step.kernel, tuple(grid), target.threads, target.shared_bytes, arguments)

    def table(self, memory: PlanBuffer) -> bytes:
        """The bytes of a constant buffer."""
        return self._read(memory.file or "")

    def _load(self, name: str) -> tuple[Any, KernelTarget, list[Any]]:
        if name not in self._loaded:
            found = self._content.kernels[name]
            architecture = self._target(found)
            target = found.targets[architecture]
            code = self._read(target.file)
            if hashlib.sha256(code).hexdigest() != target.sha256:
                raise EngineError(f"{self._directory / target.file}: is not what was built; {self._cure()}")
            ptx = architecture == "ptx"
            kernel = self._driver.load(code, target.entry, target.shared_bytes, ptx)
            scratch = [self._driver.alloc(size) if size else None for size in target.hidden.values()]
            self._loaded[name] = kernel, target, scratch
        return self._loaded[name]

    def _target(self, kernel: CompiledKernel) -> str:
        return choose(tuple(kernel.targets), self._driver.capability) or ""

    def _check_architecture(self) -> None:
        lacking = [kernel for kernel in self._content.kernels.values() if not self._target(kernel)]
        if lacking or not self._content.kernels:
            made = sorted({name for kernel in lacking for name in kernel.targets}) or ["nothing"]
            raise EngineError(
                f"{self._directory}: compiled for {', '.join(made)}, but {self._driver.name} is "
                f"sm_{self._driver.capability}; {self._cure()}"
            )

    def _cure(self) -> str:
        return BUILD.format(self._driver.capability, self._directory)

    def _read(self, file: str) -> bytes:
        try:
            return (self._directory / file).read_bytes()
        except OSError as error:
            raise EngineError(f"{self._directory / file}: {reason(error)}; {self._cure()}") from error


def find_kernels(engine: Path | None) -> Path:
    """The kernels for an engine: its own, those of the installation, or else those of the user's cache."""
    installed, cache = Path(__file__).parent / KERNELS_FOLDER, user_cache.directory()
    places = [engine / KERNELS_FOLDER] if engine else []
    places += [installed, *([cache / _CACHE_FOLDER] if cache else [])]
    return next((path for path in places if (path / KERNELS_NAME).is_file()), places[-1])


def read(directory: Path) -> KernelIndex:
    """What a kernels.json holds; EngineError where it is absent, damaged or of another schema."""
    path = directory / KERNELS_NAME
    cure = BUILD.format("XX", directory)
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: no kernels there ({reason(error)}); {cure}") from error
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise EngineError(f"{path}: schema {schema!r}, expected {SCHEMA}; {cure}")
    try:
        return json_dataclass.build(KernelIndex, value)
    except ValueError as error:
        raise EngineError(f"{path}: {error}; {cure}") from error


def choose(targets: Sequence[str], capability: int) -> str | None:
    """Which of "sm_80", .., "ptx" a GPU runs best: its own, an earlier minor version's, or the PTX."""
    own = [int(name[3:]) for name in targets if name.startswith("sm_")]
    fitting = [number for number in own if number // 10 == capability // 10 and number <= capability]
    if fitting:
        return f"sm_{max(fitting)}"
    return "ptx" if "ptx" in targets and capability >= _PTX_FROM else None


def _argument(kind: str, value: Scalar) -> np.generic:
    if kind.startswith("*"):
        return np.uint64(value)
    return np.int32(value) if kind == "i32" else np.float32(value)
