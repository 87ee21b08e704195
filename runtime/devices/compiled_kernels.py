"""Loading kernels that were compiled ahead of time: `kernels.json` and the files beside it, on one GPU.

`python -m moesr.kernels.build` writes such a directory; `operator_plan` describes its index. The files of a
target may be in an archive, as in the package (`kernel_archive`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.devices import kernel_archive
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
    digest,
)
from moesr.runtime.errors import EngineError
from moesr.runtime.system import json_dataclass
from moesr.runtime.system.files import reason

KERNELS_NAME = "kernels.json"
BUILD = "make them with: python -m moesr.kernels.build --arch sm_{0} -o {1}"

MAX_FILE_BYTES = 64 << 20
"""A larger file of a kernel or table is not read; the largest file that is built has 2 MB."""

MAX_GRID = (2**31 - 1, 65_535, 65_535)
"""The largest grid of a launch along each axis (CUDA programming guide, technical specifications)."""

EXACT_FROM = 90
"""From this compute capability on, Triton compiles for one architecture only (sm_90a, sm_100a, sm_120a).

Such a file loads on no other architecture, not even on a later minor version; GPUs of those use the PTX.
"""

PTX_FROM = 89
"""The compute capability for which the PTX is compiled; the driver compiles it for any later one."""


@dataclass(frozen=True)
class BoundLaunch:
    """A loaded kernel with its grid and arguments. Equal launches do the same work."""

    kernel: Any = field(hash=False)  # the driver's object
    name: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    arguments: tuple[np.generic, ...]

    def enqueue(self, driver: Driver) -> None:
        """Launch the kernel on the driver's stream."""
        driver.launch(self.kernel, self.grid, self.threads, self.shared_bytes, self.arguments)


class KernelFiles:
    """A directory of kernels on one GPU; each kernel is loaded when it is first bound."""

    def __init__(self, directory: Path, driver: Driver) -> None:
        """Read the directory; EngineError if it is absent, damaged, or compiled for other GPUs."""
        self._directory, self._driver = directory, driver
        self._content = read(directory)
        self._loaded: dict[str, tuple[Any, KernelTarget]] = {}
        self._bound: dict[Any, BoundLaunch] = {}
        self._archives: dict[Path, dict[str, bytes]] = {}
        self._check_architecture()

    @classmethod
    def of(cls, directory: Path, driver: Driver) -> KernelFiles:
        """Return the kernels of a directory, which are loaded once for all users of a driver."""
        key = cls, directory.resolve()
        if key not in driver.shared:
            driver.shared[key] = cls(directory, driver)
        return driver.shared[key]

    @property
    def architecture(self) -> str:
        """The architecture whose files are used on this GPU, such as "sm_90", or "ptx"."""
        return self._target(next(iter(self._content.kernels.values())))

    def find_plan(self, op: str, dtype: str, shape: Mapping[str, int]) -> OperatorPlan | None:
        """Return the plan of an operator whose shape includes `shape`; None if this GPU has none."""
        for plan in self._content.plans:
            same = all(plan.shape.get(name, 0) == value for name, value in shape.items())
            named = plan.op == op and plan.dtype == dtype and same
            if named and self._target(self._content.kernels[plan.launches[0].kernel]) in plan.targets:
                return plan
        return None

    def plan(self, op: str, dtype: str, shape: Mapping[str, int]) -> OperatorPlan:
        """See `find_plan`; EngineError if there is none."""
        if found := self.find_plan(op, dtype, shape):
            return found
        raise no_plan(str(self._directory), op, dtype, shape, self._cure())

    def holds(self, table: PlanBuffer) -> bool:
        """True if the file of a constant buffer is in the directory."""
        return (self._directory / (table.file or "")).is_file()

    def has(self, kernel: str) -> bool:
        """True if a kernel of this name is in the directory."""
        return kernel in self._content.kernels

    def bind(
        self,
        step: KernelLaunch,
        buffers: Mapping[str, int],
        scalars: Mapping[str, Scalar],
        *,
        keep: bool = True,
    ) -> BoundLaunch:
        """Return a launch between buffers, given by their addresses; equal arguments give the same object.

        EngineError is raised if the kernel cannot be loaded or the grid exceeds MAX_GRID.
        """
        if not keep:
            return self._bind(step, buffers, scalars)
        key = step, tuple(buffers.values()), tuple(scalars.values())
        if key not in self._bound:
            self._bound[key] = self._bind(step, buffers, scalars)
        return self._bound[key]

    def _bind(
        self, step: KernelLaunch, buffers: Mapping[str, int], scalars: Mapping[str, Scalar]
    ) -> BoundLaunch:
        kernel, target = self._load(step.kernel)
        types, given = self._content.kernels[step.kernel].arguments, {**scalars, **buffers}
        visible = [_argument(kind, given[name]) for kind, name in zip(types, step.arguments, strict=True)]
        arguments = (*visible, *(np.uint64(0) for _ in target.hidden))
        grid = self._grid(step, scalars)
        return BoundLaunch(kernel, step.kernel, grid, target.threads, target.shared_bytes, arguments)

    def _grid(self, step: KernelLaunch, scalars: Mapping[str, Scalar]) -> tuple[int, ...]:
        try:
            sizes = [evaluate(size, scalars) for size in step.grid]
        except ValueError as error:
            raise EngineError(f"{self._directory}: grid of {step.kernel}: {error}; {self._cure()}") from error
        grid = (*sizes, *[1] * (3 - len(sizes)))
        if not all(1 <= size <= most for size, most in zip(grid, MAX_GRID, strict=True)):
            raise EngineError(
                f"{step.kernel} would need a grid of {' x '.join(map(str, grid))} blocks, and a GPU takes "
                f"1 to {' x '.join(map(str, MAX_GRID))}; lower max_batch, or use an engine with smaller tiles"
            )
        return grid

    def table(self, buffer: PlanBuffer) -> bytes:
        """Return the bytes of a constant buffer."""
        return self._read(buffer.file or "", buffer.sha256 or "")

    def _load(self, name: str) -> tuple[Any, KernelTarget]:
        if name not in self._loaded:
            found = self._content.kernels[name]
            architecture = self._target(found)
            target = found.targets[architecture]
            code = self._read(target.file, target.sha256)
            kernel = self._driver.load(code, target.entry, target.shared_bytes, architecture == "ptx")
            self._loaded[name] = kernel, target
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

    def _read(self, file: str, sha256: str) -> bytes:
        """Return the content of a file, which lies in the archive of its folder or in the folder itself."""
        archive = kernel_archive.archive_of(self._directory, file)
        packed = archive.is_file()
        path = archive if packed else self._directory / file
        try:
            if packed:
                data = self._archive(archive).get(file, b"")
            else:
                data = json_dataclass.read_bytes(path, MAX_FILE_BYTES)
        except (OSError, ValueError) as error:
            raise EngineError(f"{path}: {reason(error)}; {self._cure()}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise EngineError(f"{self._directory / file}: does not match its recorded hash; {self._cure()}")
        return data

    def _archive(self, path: Path) -> dict[str, bytes]:
        if path not in self._archives:
            self._archives[path] = kernel_archive.read(path, MAX_FILE_BYTES)
        return self._archives[path]


def read(directory: Path) -> KernelIndex:
    """Return the content of a kernels.json; EngineError if it is absent, damaged or of another schema."""
    path = directory / KERNELS_NAME
    cure = BUILD.format("XX", directory)
    try:
        value = json_dataclass.read_json(path)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: there are no kernels ({reason(error)}); {cure}") from error
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA or isinstance(schema, bool):
        raise EngineError(f"{path}: schema {schema!r:.20}, expected {SCHEMA}; {cure}")
    try:
        index = json_dataclass.build(KernelIndex, value)
    except ValueError as error:
        raise EngineError(f"{path}: {error}; {cure}") from error
    if value.get("sha256") != digest(value):
        raise EngineError(f"{path}: its values do not match its recorded hash; {cure}")
    return index


def choose(targets: Sequence[str], capability: int) -> str | None:
    """Return the target among "sm_80", .., "ptx" for a GPU; None if it can run none of them.

    It is the GPU's own architecture, else, below EXACT_FROM, the nearest earlier minor version, else the PTX.
    """
    own = [int(name[3:]) for name in targets if name.startswith("sm_")]
    if capability >= EXACT_FROM:
        fitting = [capability] if capability in own else []
    else:
        fitting = [number for number in own if number // 10 == capability // 10 and number <= capability]
    if fitting:
        return f"sm_{max(fitting)}"
    return "ptx" if "ptx" in targets and capability >= PTX_FROM else None


def no_plan(where: str, op: str, dtype: str, shape: Mapping[str, int], cure: str) -> EngineError:
    """The error for an operator that was not compiled for this GPU."""
    sizes = "".join(f" {name} {value}," for name, value in shape.items()).rstrip(",")
    return EngineError(f"{where}: no {dtype} kernel of {op}{' with' + sizes if sizes else ''}; {cure}")


def _argument(kind: str, value: Scalar) -> np.generic:
    if kind.startswith("*"):
        return np.uint64(value)
    return np.int32(value) if kind == "i32" else np.float32(value)
