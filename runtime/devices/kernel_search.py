"""Finds compiled kernels per operator: in the engine, then in the package, then in the user's cache.

The package holds the kernels of the sampling loop and of images on a GPU for every architecture. An engine
for TensorRT brings the kernels of its graphs, and the user's cache holds those that were built for a GPU that
is not among the architectures of the package.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from moesr.runtime.devices.compiled_kernels import BUILD, KERNELS_NAME, BoundLaunch, KernelFiles, no_plan
from moesr.runtime.devices.driver import Driver
from moesr.runtime.devices.operator_plan import KernelLaunch, OperatorPlan, PlanBuffer, Scalar
from moesr.runtime.errors import EngineError
from moesr.runtime.system import user_cache

KERNELS_FOLDER = "kernels"
"""The folder of an engine, and of this package, that holds kernels."""

SHIPPED = Path(__file__).parents[1] / KERNELS_FOLDER
"""The kernels that are installed with the package (`python -m moesr.kernels.ship` makes them)."""

_CACHE_FOLDER = "cubins"

log = logging.getLogger("moesr")


class Kernels:
    """The kernels of several directories on one GPU; for each operator the first directory that has it."""

    def __init__(self, directories: Sequence[Path], driver: Driver) -> None:
        """A directory that is damaged or was compiled for other GPUs is left out with a warning.

        EngineError if no directory is left.
        """
        self._directories, self._driver = list(directories), driver
        self._files, reasons = list[KernelFiles](), list[str]()
        for directory in directories:
            try:
                self._files.append(KernelFiles.of(directory, driver))
            except EngineError as error:
                reasons.append(str(error))
        if not self._files:
            raise EngineError("; ".join(reasons) or f"no kernels for {driver.name}; {self._cure()}")
        for reason in reasons:
            log.warning("these kernels are not used: %s", reason)

    @classmethod
    def of(cls, engine: Path | None, driver: Driver) -> Kernels:
        """The kernels for an engine, from all places of `find_kernels`."""
        return cls(find_kernels(engine), driver)

    @property
    def architecture(self) -> str:
        """The architecture whose files are used first, such as "sm_90", or "ptx"."""
        return self._files[0].architecture

    def plan(self, op: str, dtype: str, shape: Mapping[str, int]) -> OperatorPlan:
        """The plan of an operator whose shape includes `shape`; EngineError if this GPU has none."""
        for files in self._files:
            if found := files.find_plan(op, dtype, shape):
                return found
        raise no_plan(", ".join(map(str, self._directories)), op, dtype, shape, self._cure())

    def bind(
        self,
        step: KernelLaunch,
        buffers: Mapping[str, int],
        scalars: Mapping[str, Scalar],
        *,
        keep: bool = True,
    ) -> BoundLaunch:
        """See `KernelFiles.bind`. A kernel's name tells its source and options, so any file of it will do."""
        files = next(f for f in self._files if f.has(step.kernel))
        return files.bind(step, buffers, scalars, keep=keep)

    def table(self, buffer: PlanBuffer) -> bytes:
        """The bytes of a constant buffer, from the first directory that holds its file."""
        holders = [files for files in self._files if files.holds(buffer)]
        return (holders or self._files)[0].table(buffer)

    def _cure(self) -> str:
        return BUILD.format(self._driver.capability, build_folder(self._driver.capability))


AnyKernels = KernelFiles | Kernels
"""Both find plans and bind launches."""


def find_kernels(engine: Path | None) -> list[Path]:
    """The directories that may hold kernels for an engine, in the order in which they are searched.

    The package's own directory is always among them, so that `read` reports if it is absent.
    """
    own = [engine / KERNELS_FOLDER] if engine else []
    cache = user_cache.directory()
    built = [cache / _CACHE_FOLDER, *sorted((cache / _CACHE_FOLDER).glob("sm_*"))] if cache else []
    return [*filter(_has_index, own), SHIPPED, *filter(_has_index, built)]


def build_folder(capability: int) -> Path:
    """The directory of the user's cache in which kernels for a GPU are looked for."""
    cache = user_cache.directory()
    return (cache / _CACHE_FOLDER if cache else Path(_CACHE_FOLDER)) / f"sm_{capability}"


def _has_index(directory: Path) -> bool:
    return (directory / KERNELS_NAME).is_file()
