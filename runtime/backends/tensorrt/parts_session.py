"""A graph in parts as one session: TensorRT plans and our kernels in turn, on the device's stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moesr.runtime.backends.tensorrt.plan_runner import PlanRunner
from moesr.runtime.devices.compiled_kernels import BoundLaunch, KernelFiles
from moesr.runtime.devices.cuda import Buffer
from moesr.runtime.devices.driver import Block, Driver
from moesr.runtime.devices.operator_plan import OperatorPlan
from moesr.runtime.devices.staging import Staging
from moesr.runtime.engine.graph_spec import BATCH, Boundary
from moesr.runtime.engine.partitioned_graph import KernelStep, Parts, layout
from moesr.runtime.errors import EngineError


class PartsSession:
    """See `Session`. All that lies between steps shares one block of memory, taken when it is bound."""

    capturable = True

    def __init__(self, path: Path, parts: Parts, runners: Mapping[str, PlanRunner], kernels: Path) -> None:
        """`runners` by the plans' files; `kernels` is a directory of kernels."""
        self._path, self._parts, self._runners, self._kernel_path = path, parts, dict(runners), kernels
        self._boundary = Boundary(*(tuple(map(parts.spec, names)) for names in (parts.inputs, parts.outputs)))
        self._driver: Driver | None = None
        self._blocks: list[Block] = []
        self._runs: dict[int, list[PlanRunner | BoundLaunch]] = {}
        self._aborted = False

    @property
    def boundary(self) -> Boundary:
        """See `Session.boundary`."""
        return self._boundary

    def bind(self, buffers: Mapping[str, Buffer], max_batch: int) -> None:
        """See `Session.bind`; EngineError where there is no kernel for a step."""
        self._let_go()
        self._driver = driver = buffers[self._boundary.outputs[0].name].driver
        kernels = KernelFiles.of(self._kernel_path, driver)
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
        """Addresses of all that lies between steps or is needed during one, for up to `batch` tiles."""
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

    def _upload(
        self, driver: Driver, kernels: KernelFiles, plans: Mapping[int, OperatorPlan]
    ) -> dict[str, int]:
        """Addresses of weights and tables of the kernels, by step and buffer."""
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
        kernels: KernelFiles,
        plans: Mapping[int, OperatorPlan],
        addresses: Mapping[str, int],
        batch: int,
    ) -> list[PlanRunner | BoundLaunch]:
        """What a run on `batch` tiles enqueues, in order."""
        found: list[PlanRunner | BoundLaunch] = []
        for at, step in enumerate(self._parts.steps):
            if step.plan:
                found.append(self._runners[step.plan.file])
            elif step.kernel:
                values = {**step.kernel.inputs, **step.kernel.outputs}
                # what a step does not name is compiled out of its kernels
                given = {b.name: addresses.get(f"{at} {b.name}", 0) for b in plans[at].buffers}
                given |= {name: addresses[value] for name, value in values.items()}
                scalars = _scalars(step.kernel, plans[at], batch)
                found += [kernels.bind(launch, given, scalars) for launch in plans[at].launches]
        return found

    def enqueue(self, batch: int) -> None:
        """See `Session.enqueue`; returns before the run is done."""
        if self._aborted or self._driver is None:
            raise EngineError(f"{self._path.name}: was told to stop")
        for step in self._runs[batch]:
            if isinstance(step, BoundLaunch):
                step.enqueue(self._driver)
            else:
                step.enqueue(batch)

    def abort(self) -> None:
        """See `Session.abort`; what is enqueued is done in milliseconds."""
        self._aborted = True

    def close(self) -> None:
        """See `Session.close`; waits for what is enqueued."""
        self._let_go()
        for runner in self._runners.values():
            runner.close()
        self._runners, self._driver = {}, None

    def _take(self, driver: Driver, nbytes: int) -> Block:
        self._blocks.append(driver.alloc(max(nbytes, 1)))
        return self._blocks[-1]

    def _let_go(self) -> None:
        if self._driver:
            self._driver.synchronize()
            for block in self._blocks:
                self._driver.free(block)
        self._blocks, self._runs = [], {}


def _scalars(step: KernelStep, plan: OperatorPlan, batch: int) -> dict[str, int | float]:
    """The plan's scalars with the step's own values, for a number of tiles."""
    own = {name: batch if value == BATCH else value for name, value in step.scalars.items()}
    return {**plan.scalars, **own}  # type: ignore[dict-item]
