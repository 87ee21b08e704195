"""A GPU as a device: canvases and buffers in its memory, our kernels around the graphs, ticks as CUDA graphs.

All work is enqueued on one stream, so it runs in the order in which the host enqueues it, and nothing is read
back between ticks. The kernels around a graph access the canvases only through tables, so that the launches
are the same from tick to tick: gather, graph and blend are captured once as a CUDA graph for each graph of
the engine and number of slots. A table is copied from pinned memory before the tick that reads it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from moesr.runtime.devices import current_gpu
from moesr.runtime.devices.capture_lock import capture_lock
from moesr.runtime.devices.compiled_kernels import BoundLaunch
from moesr.runtime.devices.driver import Block, Driver
from moesr.runtime.devices.image_kernels import ImageKernels
from moesr.runtime.devices.interface import Canvas, Mean, Session, Slot
from moesr.runtime.devices.kernel_search import AnyKernels
from moesr.runtime.devices.launch_tables import COEFFICIENTS, STEP_COLUMNS, Table, step_row
from moesr.runtime.devices.loop_kernels import LoopKernels
from moesr.runtime.devices.staging import Staging
from moesr.runtime.engine.graph_spec import TensorSpec
from moesr.runtime.errors import MoesrError, UsageError
from moesr.runtime.sampling import tiles
from moesr.runtime.sampling.samplers import Coefficients

AHEAD = 64
"""The number of ticks and steps by which the host may be ahead of the GPU."""

MAX_FAILED_CAPTURES = 3
"""After this many failed captures, the same work is always run without a CUDA graph."""

TABLE_BYTES = 1 << 17  # 256 slots of a graph with ten inputs
_STEP_BYTES = STEP_COLUMNS * 8 + COEFFICIENTS * 4
_TABLES_BYTES = 1 << 20  # pinned memory for tables whose copies are outstanding

log = logging.getLogger("moesr")


class Array:
    """A dense array in the GPU's memory."""

    def __init__(self, block: Block, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.block, self.address, self.shape, self.dtype = block, block.address, shape, dtype

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory for an input or output of a graph for `batch` tiles, on the stream of `driver`."""

    array: Array
    spec: TensorSpec
    batch: int
    driver: Driver

    @property
    def address(self) -> int:
        """The first address."""
        return self.array.address


@dataclass
class _Capture:
    """The CUDA graph of one kind of tick, once it has been captured."""

    graph: Any = None
    ran: bool = False  # it ran once without a graph, during which libraries initialize themselves
    failures: int = 0


class CudaDevice:
    """A `Device` on a GPU. Buffers are `Buffer`, canvases hold `Array`."""

    synchronous = False

    @property
    def stream(self) -> int:
        """See `Device.stream`."""
        return self._driver.stream

    def free_bytes(self) -> int:
        """See `Device.free_bytes`: memory that the worker's next call frees counts as free."""
        return self._driver.free_bytes() + sum(block.nbytes for block in self._dead.copy())

    def __init__(self, driver: Driver, kernels: AnyKernels, *, use_graphs: bool = True) -> None:
        """Open the device.

        Without `use_graphs` the same launches are enqueued one by one in the same order.
        """
        self._driver, self._use_graphs = driver, use_graphs
        self._kernels, self._loop = kernels, LoopKernels(kernels)
        self._dead: deque[Block] = deque()  # blocks that nothing refers to, which any thread may append
        self._graphs: weakref.WeakKeyDictionary[Session, dict[Any, _Capture]] = weakref.WeakKeyDictionary()
        self._weights: dict[bytes, Array] = {}
        self._staging = Staging(driver, _TABLES_BYTES, AHEAD)
        self._large = Staging.of(driver)
        self._table_array = self._empty((TABLE_BYTES,), np.uint8)
        self._table = Table(self._table_array.address, TABLE_BYTES)
        self._step = self._empty((_STEP_BYTES,), np.uint8)
        self._ignored_t = self._empty((TABLE_BYTES // 8,), np.float32)
        self._zeros = self._filled((0,))

    def buffer(self, spec: TensorSpec, batch: int) -> Buffer:
        """See `Device.buffer`."""
        return Buffer(self._filled(spec.shape(batch)), spec, batch, self._driver)

    def canvas(self, shape: tuple[int, int, int], factor: int = 1) -> Canvas:
        """See `Device.canvas`."""
        return Canvas(self._filled(shape), factor)

    def mean(
        self,
        shape: tuple[int, int, int],
        origins: Sequence[tuple[int, int]],
        weights: np.ndarray,
        factor: int = 1,
        *,
        wraps: bool = False,
    ) -> Mean:
        """See `Device.mean`; `state` is an int32 that `tile_blend` sets if a value is not finite.

        The kernels know no canvases that wrap around.
        """
        if wraps:
            raise UsageError("tileable results are made on a CPU only; choose --device cpu")
        pixels = [(y * factor, x * factor) for y, x in origins]
        weight_sum = self._copied(tiles.weight_sum(shape[1], shape[2], pixels, weights))
        flag, window = self._filled((1,), np.int32), self._window(weights)
        return Mean(self._filled(shape), factor, weights=window, weight_sum=weight_sum, state=flag)

    def with_weights(self, mean: Mean, weights: np.ndarray) -> Mean:
        """See `Device.with_weights`."""
        return replace(mean, weights=self._window(weights))

    def with_origins(self, mean: Mean, origins: Sequence[tuple[int, int]], weights: np.ndarray) -> Mean:
        """See `Device.with_origins`."""
        pixels = [(y * mean.factor, x * mean.factor) for y, x in origins]
        rows, columns = mean.data.shape[1:]
        return replace(mean, weight_sum=self._copied(tiles.weight_sum(rows, columns, pixels, weights)))

    def _window(self, weights: np.ndarray) -> Array:
        """Return a window in device memory; equal windows share the memory, and thus the launches."""
        key = weights.tobytes()
        if key not in self._weights:
            self._weights[key] = self._copied(weights)
        return self._weights[key]

    def upload(self, image: np.ndarray, factor: int = 1) -> Canvas:
        """See `Device.upload`."""
        return Canvas(self._copied(image), factor)

    def fill(self, canvas: Canvas, values: np.ndarray) -> None:
        """See `Device.fill`."""
        self._large.send_large(canvas.data.address, np.ascontiguousarray(values, np.float32))

    def image(self, size: tuple[int, int], dtype: str, factor: int) -> Canvas:
        """Allocate an uninitialized image [H, W, 3]."""
        return Canvas(self._empty((*size, 3), dtype), factor)

    @cached_property
    def images(self) -> ImageKernels:
        """The kernels for images of callers that are in this GPU's memory."""
        return ImageKernels(self._driver, self._kernels, self._empty, self._copied)

    def wait_for(self, stream: int) -> None:
        """Have all later work wait for what is enqueued on another stream of this GPU."""
        self._driver.wait_for(stream)

    def signal(self, stream: int, *, wait: bool) -> None:
        """Have another stream of this GPU wait for all work so far; with `wait` the host waits too."""
        self._driver.signal(stream)
        if wait:
            self._driver.synchronize()

    def gaussian(self, canvas: Canvas, seed: int, step: int) -> None:
        """See `Device.gaussian`; it is a sampler step whose only term is the noise."""
        c = Coefficients(*map(np.float32, (0.0, 0.0, 1.0)))
        self._take_step(canvas.data, self._cleared(canvas.data).address, c, seed, step)

    def gather(self, slots: Sequence[Slot], buffers: Mapping[str, Buffer]) -> None:
        """See `Device.gather`."""
        self._table.clear()
        launches = self._gathering(slots, buffers)
        self._send(slots, buffers)
        self._enqueue(launches)

    def blend(self, slots: Sequence[Slot], output: Buffer) -> None:
        """See `Device.blend`."""
        self._table.clear()
        launches = self._blending(slots, output)
        self._send(slots, {})
        self._enqueue(launches)

    def tick(self, slots: Sequence[Slot], session: Session, buffers: Mapping[str, Buffer]) -> None:
        """See `Device.tick`: one table, then one CUDA graph if the session can be captured."""
        self._collect()
        self._table.clear()
        before = self._gathering(slots, buffers)
        after = self._blending(slots, buffers[session.boundary.outputs[0].name])
        self._send(slots, buffers)

        def enqueue() -> None:
            self._enqueue(before)
            session.enqueue(len(slots))
            self._enqueue(after)

        if self._use_graphs and session.capturable:
            self._replay(session, (len(slots), *before, *after), enqueue)
        else:
            enqueue()
        for i, slot in enumerate(slots):  # not captured, since the addresses differ from tick to tick
            for name, canvas in slot.keeps.items():
                size = canvas.data.nbytes
                self._driver.copy(canvas.data.address, buffers[name].address + i * size, size)

    def advance(
        self, z: Canvas, out: Mean, c: Coefficients, seed: int, step: int, history: Canvas | None = None
    ) -> None:
        """See `Device.advance`: one launch."""
        self._take_step(z.data, out.data.address, c, seed, step, history.data.address if history else 0)

    def mix(self, z: Canvas, other: Canvas, c_z: float, c_other: float) -> None:
        """See `Device.mix`; it is a step without noise, over a copy that the step may clear."""
        copy = self._cleared(z.data)
        self._driver.copy(copy.address, other.data.address, z.data.nbytes)
        c = Coefficients(np.float32(c_z), np.float32(c_other), np.float32(0.0))
        self._take_step(z.data, copy.address, c, 0, 0)

    def finite(self, mean: Mean) -> bool:
        """See `Device.finite`."""
        flag = np.zeros(1, np.int32)
        self._driver.copy_out(flag, mean.state.address)
        return not flag[0]

    def download(self, canvas: Canvas, rows: slice | None = None) -> np.ndarray:
        """See `Device.download`."""
        planes, height, width = canvas.data.shape
        start, stop, _ = (rows or slice(None)).indices(height)
        result = np.empty((planes, stop - start, width), np.float32)
        if rows is None:
            self._driver.copy_out(result, canvas.data.address)
            return result
        for plane in range(planes):
            self._driver.copy_out(result[plane], canvas.data.address + 4 * (plane * height + start) * width)
        return result

    def close(self) -> None:
        """See `Device.close`."""
        with current_gpu.kept(), contextlib.ExitStack() as steps:  # the last of them comes first
            for step in (self._driver.close, self._collect, self._weights.clear, self._graphs.clear):
                steps.callback(step)  # even after an error of the GPU
            self._driver.synchronize()

    def _gathering(self, slots: Sequence[Slot], buffers: Mapping[str, Buffer]) -> list[BoundLaunch]:
        """Return one launch per input that is read from canvases, or several if pixel types differ."""
        launches = []
        for name in slots[0].sources:
            buffer, canvases = buffers[name], [slot.sources[name] for slot in slots]
            rows = [_gather_row(canvas, slot) for canvas, slot in zip(canvases, slots, strict=True)]
            start, size = 0, buffer.spec.shape(1)[1:]
            for pixel_bytes, run in groupby(canvas.data.dtype.itemsize for canvas in canvases):
                count = len(list(run))
                table = self._table.add(np.array(rows[start : start + count], np.int64))
                at = table, buffer.address + start * math.prod(size) * 4, self._ignored_t.address
                launches.append(self._loop.gather(*at, count, size, pixel_bytes))
                start += count
        return launches

    def _blending(self, slots: Sequence[Slot], output: Buffer) -> list[BoundLaunch]:
        """Return one launch, or several if the slots have different windows."""
        rows, launches, start, size = list(map(_blend_row, slots)), [], 0, output.spec.shape(1)[1:]
        for weights, run in groupby(slot.target.weights.address for slot in slots):
            count = len(list(run))
            table = self._table.add(np.array(rows[start : start + count], np.int64))
            at = table, output.address + start * math.prod(size) * 4, weights
            launches.append(self._loop.blend(*at, count, size))
            start += count
        return launches

    def _send(self, slots: Sequence[Slot], buffers: Mapping[str, Buffer]) -> None:
        """Copy the table and the scalar inputs before the launches that read them."""
        parts = [(self._table.address, self._table.content)]
        for name in slots[0].scalars if buffers else ():
            given = slots if buffers[name].spec.per_tile else slots[:1]
            parts.append((buffers[name].address, np.array([s.scalars[name] for s in given], np.float32)))
        self._staging.send(parts)

    def _enqueue(self, launches: Sequence[BoundLaunch]) -> None:
        for launch in launches:
            launch.enqueue(self._driver)

    def _replay(self, session: Session, key: Hashable, enqueue: Callable[[], None]) -> None:
        """Enqueue work as a CUDA graph from its second run on; libraries initialize themselves in the first.

        The work is enqueued launch by launch while another thread opens a graph and if the capture failed. A
        later tick tries again, up to MAX_FAILED_CAPTURES times.
        """
        capture = self._graphs.setdefault(session, {}).setdefault(key, _Capture())
        if capture.graph is None and capture.ran and capture.failures < MAX_FAILED_CAPTURES:
            self._capture(capture, enqueue)
        if capture.graph is None:
            enqueue()
            capture.ran = True
        else:
            self._driver.replay(capture.graph)

    def _capture(self, capture: _Capture, enqueue: Callable[[], None]) -> None:
        """Try to capture a graph; after a failure none of its work is enqueued."""
        if not capture_lock.acquire(blocking=False):
            return  # another thread opens a graph, which could invalidate the capture
        try:
            self._driver.begin_capture()
            try:
                enqueue()
            except BaseException:
                self._driver.abandon_capture()
                raise
            capture.graph = self._driver.end_capture()
        except MoesrError as error:
            capture.failures += 1
            last = capture.failures == MAX_FAILED_CAPTURES
            then = "it is not tried again" if last else "it will be tried again"
            log.log(
                logging.WARNING if last else logging.INFO,
                "a CUDA graph was not captured, %s: %s",
                then,
                error,
            )
        finally:
            capture_lock.release()

    def _take_step(
        self, z: Array, sums: int, c: Coefficients, seed: int, step: int, history: int = 0
    ) -> None:
        """`z <- c_z z + c_out sums + c_noise noise(seed, step)` and `sums <- 0`; `history` is an address."""
        self._collect()
        at = self._step.address
        row = step_row(z.address, sums, at + STEP_COLUMNS * 8, math.prod(z.shape), seed, step, history)
        coefficients = np.array([c.c_z, c.c_out, c.c_noise, c.c_history, c.x_z, c.x_out], np.float32)
        self._staging.send([(at, row), (at + row.nbytes, coefficients)])
        self._loop.step(at).enqueue(self._driver)

    def _cleared(self, like: Array) -> Array:
        """Return zeros of at least that size, which a step clears again; the memory is reused."""
        if self._zeros.nbytes < like.nbytes:
            self._zeros = self._filled(like.shape)
        return self._zeros

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an uninitialized array, whose memory is freed some time after its last reference is gone."""
        self._collect()
        array_dtype = np.dtype(dtype)
        block = self._driver.alloc(max(math.prod(shape) * array_dtype.itemsize, 1))
        array = Array(block, shape, array_dtype)
        weakref.finalize(array, self._dead.append, block).atexit = False
        return array

    def _filled(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """Return zeros."""
        array = self._empty(shape, dtype)
        if array.nbytes:
            self._driver.clear(array.address, array.nbytes)
        return array

    def _copied(self, values: np.ndarray) -> Array:
        array = self._empty(values.shape, values.dtype)
        self._large.send_large(array.address, np.ascontiguousarray(values))
        return array

    def _collect(self) -> None:
        """Free the blocks that nothing refers to, on this thread, stream-ordered and outside of captures."""
        while self._dead:
            self._driver.free(self._dead.popleft())


def _strides(shape: tuple[int, ...], latent: bool) -> tuple[int, int]:
    """Return the strides of planes and rows in elements, of a latent [C, H, W] or of an image [H, W, C]."""
    return (shape[1] * shape[2], shape[2]) if latent else (1, shape[1] * shape[2])


def _gather_row(canvas: Canvas, slot: Slot) -> tuple[int, ...]:
    data = canvas.data
    plane, row = _strides(data.shape, latent=data.dtype == np.float32)
    return data.address, plane, row, (slot.y - canvas.top) * canvas.factor, slot.x * canvas.factor, 0


def _blend_row(slot: Slot) -> tuple[int, ...]:
    mean = slot.target
    addresses = mean.data.address, mean.weight_sum.address, mean.state.address
    top = (slot.y - mean.top) * mean.factor
    return *addresses, *_strides(mean.data.shape, latent=True), top, slot.x * mean.factor
