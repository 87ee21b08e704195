"""A device and sessions that record every call and do the work only when a result is fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesr.runtime.devices.host import HostDevice
from moesr.runtime.devices.interface import Canvas, Mean, Slot
from moesr.runtime.engine.graph_spec import Graph, TensorSpec
from moesr.runtime.sampling.samplers import Coefficients

Function = Callable[[Mapping[str, np.ndarray]], np.ndarray | tuple[np.ndarray, ...]]
"""A graph as a function from the inputs of one tile to its output or outputs."""


class FakeSession:
    """A session over a plain function; it records the batch size of each run."""

    capturable = False

    def __init__(self, graph: Graph, function: Function) -> None:
        self.boundary, self.batches, self.function = graph.boundary, [], function
        self.buffers: Mapping[str, np.ndarray] = {}
        self.closed = False

    def bind(self, buffers: Mapping[str, np.ndarray], max_batch: int) -> None:
        assert all(len(buffers[s.name]) == max_batch for s in self.boundary.inputs if s.per_tile)
        self.buffers = buffers
        for buffer in buffers.values():
            buffer.fill(np.nan)

    def enqueue(self, batch: int) -> None:
        self.batches.append(batch)
        self.compute(batch, self.buffers)

    def compute(self, batch: int, buffers: Mapping[str, np.ndarray]) -> None:
        for i in range(batch):
            row = {s.name: buffers[s.name][i if s.per_tile else 0] for s in self.boundary.inputs}
            made = self.function(row)
            made = made if isinstance(made, tuple) else (made,)
            for spec, value in zip(self.boundary.outputs, made, strict=True):
                buffers[spec.name][i] = value

    def abort(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@dataclass(eq=False)
class Handle:
    """Memory of the recording device; it holds nothing before the log is played."""

    make: Callable[[], Any]
    made: Any = None


class RecordingDevice:
    """A device that defers all work: each call goes into `log` and is done by `download` or `finite`.

    A host that reads a result between ticks therefore finds nothing, and the read shows in the log.
    """

    synchronous, stream, free_bytes = False, None, None

    def __init__(self) -> None:
        self.host = HostDevice()
        self.log: list[str] = []
        self._pending: list[Callable[[], object]] = []

    def _later(self, name: str, call: Callable[[], object]) -> None:
        self.log.append(name)
        self._pending.append(call)

    def _handle(self, name: str, make: Callable[[], Any]) -> Handle:
        handle = Handle(make)
        self._later(name, lambda: setattr(handle, "made", make()))
        return handle

    def play(self) -> None:
        """Do everything that was asked for so far, in order."""
        pending, self._pending = self._pending, []
        for call in pending:
            call()

    def buffer(self, spec: TensorSpec, batch: int) -> Handle:
        return self._handle(f"buffer {spec.name}", lambda: np.full(spec.shape(batch), np.nan, np.float32))

    def canvas(self, shape: tuple[int, int, int], factor: int = 1) -> Canvas:
        return Canvas(self._handle("canvas", lambda: self.host.canvas(shape, factor)), factor)

    def mean(
        self,
        shape: tuple[int, int, int],
        origins: Sequence[tuple[int, int]],
        weights: np.ndarray,
        factor: int = 1,
        *,
        wraps: bool = False,
    ) -> Mean:
        handle = self._handle("mean", lambda: self.host.mean(shape, origins, weights, factor, wraps=wraps))
        return Mean(handle, factor, weights=None, weight_sum=None, state=None)

    def with_weights(self, mean: Mean, weights: np.ndarray) -> Mean:
        handle = self._handle("with_weights", lambda: self.host.with_weights(mean.data.made, weights))
        return Mean(handle, mean.factor, weights=None, weight_sum=None, state=None)

    def with_origins(self, mean: Mean, origins: Sequence[tuple[int, int]], weights: np.ndarray) -> Mean:
        handle = self._handle(
            "with_origins", lambda: self.host.with_origins(mean.data.made, origins, weights)
        )
        return Mean(handle, mean.factor, weights=None, weight_sum=None, state=None)

    def upload(self, image: np.ndarray, factor: int = 1) -> Canvas:
        return Canvas(self._handle("upload", lambda: self.host.upload(image, factor)), factor)

    def fill(self, canvas: Canvas, values: np.ndarray) -> None:
        self._later("fill", lambda: self.host.fill(Canvas(canvas.data.made.data), values))

    def gaussian(self, canvas: Canvas, seed: int, step: int) -> None:
        self._later("gaussian", lambda: self.host.gaussian(canvas.data.made, seed, step))

    def gather(self, slots: Sequence[Slot], buffers: Mapping[str, Handle]) -> None:
        slots = list(slots)
        self._later(
            f"gather {len(slots)}",
            lambda: self.host.gather([_real(s) for s in slots], {n: b.made for n, b in buffers.items()}),
        )

    def blend(self, slots: Sequence[Slot], output: Handle) -> None:
        slots = list(slots)
        self._later(f"blend {len(slots)}", lambda: self.host.blend([_real(s) for s in slots], output.made))

    def tick(self, slots: Sequence[Slot], session: FakeSession, buffers: Mapping[str, Handle]) -> None:
        self.gather(slots, buffers)
        session.enqueue(len(slots))
        self.blend(slots, buffers[session.boundary.outputs[0].name])
        if any(slot.keeps for slot in slots):
            kept = list(slots)
            self._later(
                f"keep {len(kept)}",
                lambda: self.host.keep([_real(s) for s in kept], {n: b.made for n, b in buffers.items()}),
            )

    def close(self) -> None:
        pass

    def advance(
        self, z: Canvas, out: Mean, c: Coefficients, seed: int, step: int, history: Canvas | None = None
    ) -> None:
        def advance() -> None:
            kept = history.data.made if history else None
            self.host.advance(z.data.made, out.data.made, c, seed, step, kept)

        self._later("advance", advance)

    def mix(self, z: Canvas, other: Canvas, c_z: float, c_other: float) -> None:
        self._later("mix", lambda: self.host.mix(z.data.made, other.data.made, c_z, c_other))

    def finite(self, mean: Mean) -> bool:
        self.log.append("READ finite")
        self.play()
        return self.host.finite(mean.data.made)

    def download(self, canvas: Canvas, rows: slice | None = None) -> np.ndarray:
        self.log.append("READ download")
        self.play()
        return self.host.download(canvas.data.made, rows)


class RecordingSession(FakeSession):
    """A session of a graph whose runs are entries in the log of the device."""

    def __init__(self, device: RecordingDevice, graph: Graph, function: Function) -> None:
        super().__init__(graph, function)
        self._device, self._role = device, graph.file

    def bind(self, buffers: Mapping[str, Any], max_batch: int) -> None:
        self.buffers = buffers

    def enqueue(self, batch: int) -> None:
        self.batches.append(batch)
        buffers = self.buffers

        def run() -> None:
            self.compute(batch, {name: handle.made for name, handle in buffers.items()})

        self._device._later(f"run {self._role}", run)


def _real(slot: Slot) -> Slot:
    """Return the slot over the canvases of the host."""
    sources = {name: canvas.data.made for name, canvas in slot.sources.items()}
    keeps = {name: canvas.data.made for name, canvas in slot.keeps.items()}
    return Slot(sources, slot.scalars, slot.target.data.made, slot.y, slot.x, keeps)
