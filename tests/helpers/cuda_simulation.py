"""A simulated CUDA driver over host memory, which checks every use of memory; kernels are NumPy functions.

Enqueued work is done only when the host waits for it. So three faults show as wrong numbers or as an error:
pinned memory that is filled too early, memory that is freed or reused while enqueued work still needs it, and
results that are read too early.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import image_simulation
import numpy as np
from recording import FakeSession, Function

from moesr.kernels.build import substitute
from moesr.kernels.plan import Op, TritonLaunch, TritonPlan
from moesr.kernels.registry import SHIPPED
from moesr.runtime.devices.capture_lock import capture_lock
from moesr.runtime.devices.compiled_kernels import KernelFiles
from moesr.runtime.devices.cuda import Buffer, CudaDevice
from moesr.runtime.devices.operator_plan import (
    SCHEMA,
    CompiledKernel,
    KernelIndex,
    KernelLaunch,
    KernelTarget,
    OperatorPlan,
    PlanBuffer,
)
from moesr.runtime.engine.graph_spec import Graph
from moesr.runtime.errors import EngineError, MemoryLimitError
from moesr.runtime.sampling import noise
from moesr.runtime.system.files import sha256_of

POISON = 0xFF  # the bytes of a NaN in every float type
_FIRST_ADDRESS = 1 << 20


@dataclass(eq=False)
class SimulatedBlock:
    address: int
    nbytes: int


class SimulatedDriver:
    """A driver as in `devices.driver.Driver`; `log` lists what is enqueued, awaited and read, in order."""

    name, stream = "Simulated GPU", 0

    def __init__(self, capability: int = 90, memory_bytes: int | None = None) -> None:
        self.capability, self._free_bytes = capability, memory_bytes
        self.least_free = memory_bytes or 0  # since `set_free`
        self.log: list[str] = []
        self.kernels: list[str] = []  # names of all kernels that ran, in order
        self.blocks: dict[int, np.ndarray] = {}
        self._top = _FIRST_ADDRESS
        self._freed: list[SimulatedBlock] = []
        self._queue: list[Callable[[], object]] = []
        self._captured: list[tuple[str, Callable[[], object]]] | None = None
        self._done = self._enqueued = 0
        self.peak_pinned = 0
        self.closed = False
        self.shared: dict[Any, Any] = {}
        self.loads: list[str] = []  # names of the kernels that were loaded
        self.failing_captures: deque[str] = deque()  # for the next captures: "begin", "within" or "end"
        self._failing: str | None = None

    # memory

    def alloc(self, nbytes: int) -> SimulatedBlock:
        assert self._captured is None, "memory is allocated while a graph is captured"
        if self._free_bytes is not None:
            if nbytes > self._free_bytes:
                raise MemoryLimitError("no memory")
            self._free_bytes -= nbytes
            self.least_free = min(self.least_free, self._free_bytes)
        again = next((b for b in self._freed if b.nbytes >= nbytes), None)
        if again:  # memory is reused in stream order, as in a pool
            self._freed.remove(again)
            block = SimulatedBlock(again.address, nbytes)
        else:
            block = SimulatedBlock(self._top, nbytes)
            self._top += -(-(nbytes + 256) // 256) * 256  # leaves a gap after the block
        self._add("alloc", lambda: self._make(block))
        return block

    def _make(self, block: SimulatedBlock) -> None:
        assert block.address not in self.blocks
        self.blocks[block.address] = np.full(block.nbytes, POISON, np.uint8)

    def free_bytes(self) -> int:
        return 1 << 40 if self._free_bytes is None else self._free_bytes

    def set_free(self, nbytes: int) -> None:
        self._free_bytes = self.least_free = nbytes

    def free(self, block: SimulatedBlock) -> None:
        assert self._captured is None, "memory is freed while a graph is captured"
        self._add("free", lambda: self.blocks.pop(block.address))
        if self._free_bytes is not None:
            self._free_bytes += block.nbytes
        self._freed.append(block)

    def pinned(self, nbytes: int) -> np.ndarray:
        self.peak_pinned += nbytes
        return np.full(nbytes, POISON, np.uint8)

    def place(self, data: np.ndarray) -> int:
        """Put memory of another library into the GPU, and return its address."""
        address, self._top = self._top, self._top + -(-(data.nbytes + 256) // 256) * 256
        self.blocks[address] = data
        return address

    def view(self, address: int, count: int, dtype: Any = np.uint8) -> np.ndarray:
        """Return live memory as an array; an error is raised unless all of it lies inside one block."""
        nbytes = count * np.dtype(dtype).itemsize
        for base, data in self.blocks.items():
            if base <= address and address + nbytes <= base + len(data):
                return data[address - base : address - base + nbytes].view(dtype)
        raise AssertionError(f"{nbytes} bytes at {address}are not memory of the device")

    # enqueued work

    def _add(self, name: str, call: Callable[[], object]) -> None:
        if self._captured is not None:
            if self._failing == "within":
                raise EngineError("the capture is invalid")
            self._captured.append((name, call))
            return
        self.log.append(name)
        self._queue.append(call)
        self._enqueued += 1

    def clear(self, address: int, nbytes: int) -> None:
        self._add("clear", lambda: self.view(address, nbytes).fill(0))

    def copy_in(self, address: int, source: np.ndarray) -> None:
        assert self._captured is None, "a graph would read this memory again at every replay"
        self._add("copy in", lambda: np.copyto(self.view(address, source.nbytes), source))

    def copy(self, address: int, source: int, nbytes: int) -> None:
        self._add("copy", lambda: np.copyto(self.view(address, nbytes), self.view(source, nbytes)))

    def library_call(self, name: str, call: Callable[[], object]) -> None:
        """Enqueue work on the stream as a library such as TensorRT does."""
        self._add(name, call)

    def load(self, code: bytes, entry: str, shared_bytes: int, ptx: bool = False) -> tuple[str, dict]:
        self.loads.append(entry)
        return entry, json.loads(code)

    def launch(
        self,
        kernel: tuple[str, dict],
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[np.generic],
    ) -> None:
        entry, constants = kernel
        assert all(int(a) % 16 == 0 for a in arguments if isinstance(a, np.uint64))  # as compiled
        values = [int(a) if isinstance(a, np.integer) else float(a) for a in arguments]
        self._add(entry, lambda: (self.kernels.append(entry), RUN[entry](self, constants, grid, *values)))

    # graphs

    def begin_capture(self) -> None:
        assert self._captured is None
        self._failing = self.failing_captures.popleft() if self.failing_captures else None
        if self._failing:
            self.log.append("failed capture")
        if self._failing == "begin":
            raise EngineError("a capture cannot begin")
        self._captured = []

    def end_capture(self) -> list[tuple[str, Callable[[], object]]]:
        captured, self._captured = self._captured, None
        if self._failing == "end":
            raise EngineError("the capture is invalidated by another thread")
        assert captured
        self.log.append("capture")
        return captured

    def abandon_capture(self) -> None:
        self._captured = None

    def replay(self, graph: list[tuple[str, Callable[[], object]]]) -> None:
        self.log.append("replay")
        for _, call in graph:
            self._queue.append(call)
        self._enqueued += len(graph)

    # waiting

    def record(self) -> int:
        return self._enqueued

    def wait(self, event: int) -> None:
        if event > self._done:
            self.log.append("WAIT")
            self._play(event)

    def wait_for(self, stream: int) -> None:
        self._add(f"wait for stream {stream}", lambda: None)

    def signal(self, stream: int) -> None:
        self._add(f"signal stream {stream}", lambda: None)

    def copy_out(self, target: np.ndarray, address: int) -> None:
        self.log.append("READ")
        self._play(self._enqueued)
        target.reshape(-1).view(np.uint8)[:] = self.view(address, target.nbytes)

    def synchronize(self) -> None:
        self._play(self._enqueued)

    def close(self) -> None:
        self.closed = True
        self.shared.clear()
        self.synchronize()

    def _play(self, until: int) -> None:
        count = until - self._done
        now, self._queue = self._queue[:count], self._queue[count:]
        self._done += len(now)
        for call in now:
            call()


class SimulatedSession(FakeSession):
    """A graph that is enqueued as a library does it, between buffers of the simulated GPU."""

    capturable = True

    def __init__(self, driver: SimulatedDriver, graph: Graph, function: Function) -> None:
        super().__init__(graph, function)
        self._driver, self._role = driver, graph.file.removesuffix(".onnx")

    def bind(self, buffers: Mapping[str, Buffer], max_batch: int) -> None:
        self.buffers = buffers

    def enqueue(self, batch: int) -> None:
        self.batches.append(batch)
        buffers = self.buffers

        def run() -> None:
            self._driver.kernels.append(self._role)
            self.compute(batch, {name: self._array(b) for name, b in buffers.items()})

        self._driver.library_call(f"run {self._role}", run)

    def _array(self, buffer: Buffer) -> np.ndarray:
        shape = buffer.spec.shape(buffer.batch)
        return self._driver.view(buffer.address, int(np.prod(shape)), np.float32).reshape(shape)


# kernels


def window(driver, address: int, rows: tuple[int, int], columns: tuple[int, int], dtype: Any) -> np.ndarray:
    """Return a view [rows, columns] of a canvas; both arguments are (count, stride in elements)."""
    (height, row), (width, column) = rows, columns
    reach = driver.view(address, (height - 1) * row + (width - 1) * column + 1, dtype)
    size = reach.itemsize
    return np.lib.stride_tricks.as_strided(reach, (height, width), (row * size, column * size))


def tile_gather(driver, constants, grid, slots, tiles, t, height, width, *hidden) -> None:
    _, channels, count = grid
    table = driver.view(slots, 6 * count, np.int64).reshape(count, 6)
    out = driver.view(tiles, count * channels * height * width, np.float32)
    out = out.reshape(count, channels, height, width)
    dtype = {4: np.float32, 2: np.uint16, 1: np.uint8}[constants["PIXEL_BYTES"]]
    column = 1 if dtype is np.float32 else channels
    for i, (address, plane, row, y, x, time) in enumerate(table.tolist()):
        driver.view(t, count, np.float32)[i] = time
        if not address:  # an empty slot
            out[i] = 0
        for c in range(channels if address else 0):
            start = address + (c * plane + y * row + x * column) * np.dtype(dtype).itemsize
            tile = window(driver, start, (height, row), (width, column), dtype)
            if dtype is not np.float32:
                tile = tile.astype(np.float32) * np.float32(2.0 / np.iinfo(dtype).max) - np.float32(1.0)
            out[i, c] = tile


def tile_blend(driver, constants, grid, slots, tiles, weights, height, width, *hidden) -> None:
    _, channels, count = grid
    table = driver.view(slots, 7 * count, np.int64).reshape(count, 7).tolist()
    values = driver.view(tiles, count * channels * height * width, np.float32)
    share = driver.view(weights, height * width, np.float32).reshape(height, width)
    for tile, row in zip(values.reshape(count, channels, height, width), table, strict=True):
        sums, weight_sum, flag, plane, stride, y, x = row
        if not sums:  # an empty slot
            continue
        if not np.isfinite(tile).all():
            driver.view(flag, 1, np.int32)[0] |= 1
        size = (height, stride), (width, 1)
        total = window(driver, weight_sum + (y * stride + x) * 4, *size, np.float32)
        for c in range(channels):
            start = sums + (c * plane + y * stride + x) * 4
            window(driver, start, *size, np.float32)[:] += tile[c] * (share / total)


def sampler_step(driver, constants, grid, jobs, *hidden) -> None:
    table = driver.view(jobs, 7 * grid[1], np.uint64).reshape(-1, 7)
    for z, sums, coefficients, size, seed, step, kept in table:
        if not size:  # an empty row
            continue
        moved, out = (driver.view(int(p), int(size), np.float32) for p in (z, sums))
        c_z, c_out, c_noise = driver.view(int(coefficients), 3, np.float32)
        total = moved * c_z
        if kept:
            history = driver.view(int(kept), int(size), np.float32)
            c_history, x_z, x_out = driver.view(int(coefficients) + 12, 3, np.float32)
            total += history * c_history
            history[:] = moved * x_z + out * x_out
        total += out * c_out
        if c_noise:
            number = (int(step) - 1) % (1 << 64)
            number = noise.INITIAL_NOISE if number == (1 << 64) - 1 else number
            total += noise.gaussian(int(seed), number, (int(size),)) * c_noise
        moved[:], out[:] = total, 0


RUN = {
    "tile_gather": tile_gather,
    "tile_blend": tile_blend,
    "sampler_step": sampler_step,
    **image_simulation.RUN,
}


def write_kernels(
    directory: Path,
    targets: Sequence[str] = ("sm_90",),
    ops: Sequence[Op] = SHIPPED,
    dtype: str = "fp32",
    without: str = "",
) -> Path:
    """Write kernels.json as the build does for the deployed cases of the operators, with simulated files."""
    directory.mkdir(parents=True, exist_ok=True)
    kernels, plans = {}, []
    for op in ops:
        for case in op.deployed:
            if case.dtype != dtype or op.name == without:
                continue
            plan = op.plan(case.shape, dtype, 90)
            launches = []
            for launch in plan.launches:
                name = f"{op.name}.{launch.function}.{len(kernels)}"
                kernels[name] = CompiledKernel(
                    op.name,
                    launch.function,
                    tuple(plan.type_of(a) for a in launch.arguments),
                    dict(launch.constants),
                    {
                        t: _compiled(directory, t, name, launch, [plan.type_of(a) for a in launch.arguments])
                        for t in targets
                    },
                )
                grid = tuple(substitute(str(size), launch.constants) for size in launch.grid)
                launches.append(KernelLaunch(name, launch.arguments, grid))
            buffers = tuple(_buffer(directory, plan, buffer) for buffer in plan.buffers)
            fields = (op.name, dtype, dict(case.shape), dict(plan.scalars), buffers)
            plans.append(OperatorPlan(*fields, tuple(launches), tuple(targets)))
    index = KernelIndex(SCHEMA, kernels, tuple(plans))
    (directory / "kernels.json").write_text(index.to_json())
    return directory


def _compiled(
    directory: Path, target: str, name: str, launch: TritonLaunch, types: list[str]
) -> KernelTarget:
    file = directory / target / f"{name}.cubin"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dict(launch.constants) | {"types": types}))
    return KernelTarget(
        file=file.relative_to(directory).as_posix(),
        sha256=sha256_of(file),
        entry=launch.function,
        threads=128,
        shared_bytes=0,
        hidden={"global_scratch": 0, "profile_scratch": 0},
    )


def _buffer(directory: Path, plan: TritonPlan, buffer: PlanBuffer) -> PlanBuffer:
    if buffer.role != "table":
        return buffer
    data = np.ascontiguousarray(plan.tables[buffer.name], np.float32).tobytes()
    sha256 = hashlib.sha256(data).hexdigest()
    file = directory / "tables" / f"{sha256[:16]}.bin"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    return replace(buffer, file=file.relative_to(directory).as_posix(), sha256=sha256)


def lock_is_held() -> bool:
    """Return True if another thread cannot take the lock that keeps opening and capturing apart."""
    found: list[bool] = []

    def probe() -> None:
        found.append(not capture_lock.acquire(blocking=False))
        if not found[0]:
            capture_lock.release()

    thread = threading.Thread(target=probe)
    thread.start()
    thread.join()
    return found[0]


def simulated_device(directory: Path, *, use_graphs: bool = True) -> tuple[CudaDevice, SimulatedDriver]:
    driver = SimulatedDriver()
    return CudaDevice(driver, KernelFiles(write_kernels(directory), driver), use_graphs=use_graphs), driver
