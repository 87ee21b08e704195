"""A session for a graph in parts: TensorRT plans and our kernels run in turn on the device's stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moesr.runtime.backends.base import GpuSession
from moesr.runtime.backends.tensorrt.plan_runner import PlanRunner
from moesr.runtime.devices.compiled_kernels import BoundLaunch
from moesr.runtime.devices.cuda import Buffer
from moesr.runtime.devices.driver import Driver
from moesr.runtime.devices.kernel_search import Kernels
from moesr.runtime.devices.operator_plan import OperatorPlan
from moesr.runtime.devices.staging import Staging
from moesr.runtime.engine.graph_spec import BATCH, Boundary
from moesr.runtime.engine.partitioned_graph import KernelStep, Parts, layout


class PartsSession(GpuSession):
    """A `Session` whose values between steps share one block of memory, which `bind` allocates.

    `bind` raises EngineError if there is no kernel for a step.
    """

    def __init__(
        self, path: Path, declared: Boundary, parts: Parts, runners: Mapping[str, PlanRunner]
    ) -> None:
        """Make a session; `declared` may have more inputs than the graph.

        `runners` are keyed by the plans' file names.
        """
        super().__init__(path, declared.only(set(parts.inputs)))
        self._parts, self._runners = parts, dict(runners)
        self._runs: dict[int, list[PlanRunner | BoundLaunch]] = {}

    def _bind(self, driver: Driver, buffers: Mapping[str, Buffer], max_batch: int) -> None:
        kernels = Kernels.of(self._path.parent, driver)
        plans = {
            at: kernels.plan(step.kernel.op, step.kernel.dtype, step.kernel.shape)
            for at, step in enumerate(self._parts.steps)
            if step.kernel
        }
        addresses = self._place(driver, plans, max_batch)
        addresses |= {name: buffer.address for name, buffer in buffers.items()}
        for at, step in enumerate(self._parts.steps):
            if step.plan:
                names = (*step.plan.inputs, *step.plan.outputs)
                given = {name: addresses[name] for name in names}
                self._runners[step.plan.file].bind(driver, given, addresses.get(f"{at} work", 0))
        constants = self._upload(driver, kernels, plans)
        self._runs = {
            batch: self._steps(kernels, plans, addresses | constants, batch)
            for batch in range(1, max_batch + 1)
        }

    def _place(self, driver: Driver, plans: Mapping[int, OperatorPlan], batch: int) -> dict[str, int]:
        """Allocate the values between steps and the steps' working memory; return the addresses by name."""
        lives = self._parts.lives()
        sizes = {name: self._parts.nbytes(name, batch) for name in lives}
        for at, step in enumerate(self._parts.steps):
            needs = {"work": self._runners[step.plan.file].work_bytes} if step.plan else {}
            if step.kernel:
                scalars = _scalars(step.kernel, plans[at], batch)
                scratch = [buffer for buffer in plans[at].buffers if buffer.role == "scratch"]
                needs = {buffer.name: buffer.nbytes(scalars) for buffer in scratch}
            for name, nbytes in needs.items():
                sizes[f"{at} {name}"], lives[f"{at} {name}"] = nbytes, (at, at)
        offsets, total = layout(sizes, lives)
        block = self._take(driver, total)
        return {name: block.address + offset for name, offset in offsets.items()}

    def _upload(self, driver: Driver, kernels: Kernels, plans: Mapping[int, OperatorPlan]) -> dict[str, int]:
        """Copy the kernels' weights and tables to the GPU; return their addresses by step and buffer."""
        file = self._parts.constants
        data = (self._path.parent / file).read_bytes() if file else b""
        contents: dict[str, bytes] = {}
        for at, step in enumerate(self._parts.steps):
            if step.kernel:
                for name, constant in step.kernel.constants.items():
                    contents[f"{at} {name}"] = data[constant.offset : constant.offset + constant.nbytes]
                tables = (buffer for buffer in plans[at].buffers if buffer.role == "table")
                contents |= {f"{at} {buffer.name}": kernels.table(buffer) for buffer in tables}
        sizes = {name: len(content) for name, content in contents.items()}
        offsets, total = layout(sizes, dict.fromkeys(sizes, (0, 0)))
        block, staging = self._take(driver, total), Staging.of(driver)
        for name, content in contents.items():
            staging.send_large(block.address + offsets[name], np.frombuffer(content, np.uint8))
        return {name: block.address + offset for name, offset in offsets.items()}

    def _steps(
        self,
        kernels: Kernels,
        plans: Mapping[int, OperatorPlan],
        addresses: Mapping[str, int],
        batch: int,
    ) -> list[PlanRunner | BoundLaunch]:
        """Return the plans and launches of a run on `batch` tiles, in order."""
        found: list[PlanRunner | BoundLaunch] = []
        for at, step in enumerate(self._parts.steps):
            if step.plan:
                found.append(self._runners[step.plan.file])
            elif step.kernel:
                values = {**step.kernel.inputs, **step.kernel.outputs}
                # the kernels were compiled without buffers that the step does not name
                given = {b.name: addresses.get(f"{at} {b.name}", 0) for b in plans[at].buffers}
                given |= {name: addresses[value] for name, value in values.items()}
                scalars = _scalars(step.kernel, plans[at], batch)
                found += [kernels.bind(launch, given, scalars) for launch in plans[at].launches]
        return found

    def _enqueue(self, driver: Driver, batch: int) -> None:
        for step in self._runs[batch]:
            if isinstance(step, BoundLaunch):
                step.enqueue(driver)
            else:
                step.enqueue(batch)

    def _release(self) -> None:
        for runner in self._runners.values():
            runner.close()
        self._runners, self._runs = {}, {}


def _scalars(step: KernelStep, plan: OperatorPlan, batch: int) -> dict[str, int | float]:
    """Return the scalars of the plan for `batch` tiles; those that the step sets itself take precedence."""
    own = {name: batch if value == BATCH else value for name, value in step.scalars.items()}
    return {**plan.scalars, **own}  # type: ignore[dict-item]
