"""Devices: where canvases live, and what surrounds a graph in a tick.

A tick is one run of a graph over a few slots, and what runs is always the same: `gather` fills the graph's
inputs from the canvases that the slots name, the session runs, `blend` adds its output to the canvases' sums,
and for an image whose step is complete `advance` moves its latent by one step of the sampler. Only the slots
differ from tick to tick. Nothing here returns values to the host but `finite` and `download`, so a device
that works on its own may fall behind the host that feeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from moesr.runtime.engine.graph_spec import Boundary, TensorSpec
from moesr.runtime.sampling.samplers import Coefficients


@dataclass(frozen=True, eq=False)
class Canvas:
    """An image or latent of any size in a device's memory.

    `data` is float32 [C, H, W], or an image's own uint8 or uint16 [H, W, C], which `gather` maps to [-1, 1].
    `factor` is how many of its pixels stand for one of the latent grid, along one side; 0 is a canvas of one
    tile, wherever that lies.
    """

    data: Any
    factor: int = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Mean(Canvas):
    """A canvas made of tiles: their mean, weighted by `weights` [tile, tile] over `weight_sum` [H, W].

    `state` is the device's own: among it a flag that is raised by values that are not finite.
    """

    weights: Any
    weight_sum: Any
    state: Any


@dataclass(frozen=True, eq=False)
class Slot:
    """A row of a tick's table: where one tile's inputs come from, and where its output goes.

    `sources` and `scalars` are by the graph's inputs; (y, x) is the tile's origin on the latent grid. `keeps`
    are canvases of this tile, by those of the graph's further outputs that are copied to them.
    """

    sources: Mapping[str, Canvas]
    scalars: Mapping[str, float]
    target: Mean
    y: int
    x: int
    keeps: Mapping[str, Canvas] = field(default_factory=dict)


class Device(Protocol):
    """Memory of one processor and the operations of a tick. One thread at a time uses it."""

    @property
    def synchronous(self) -> bool:
        """Whether every call is done when it returns, so that results may be looked at between ticks."""
        ...

    @property
    def stream(self) -> int | None:
        """Handle of the stream on which sessions enqueue their runs; None where runs are calls."""
        ...

    @property
    def free_bytes(self) -> Callable[[], int] | None:
        """Tells any thread how much of its memory could still be taken; None where that is the host's."""
        ...

    def buffer(self, spec: TensorSpec, batch: int) -> Any:
        """Memory for a graph's input or output, `batch` tiles long, to be bound to a session."""
        ...

    def canvas(self, shape: tuple[int, int, int], factor: int = 1) -> Canvas:
        """An empty latent, float32 [C, H, W]."""
        ...

    def mean(
        self,
        shape: tuple[int, int, int],
        origins: Sequence[tuple[int, int]],
        weights: np.ndarray,
        factor: int = 1,
    ) -> Mean:
        """A canvas [C, H, W] to be made of tiles at `origins` on the latent grid.

        `weights` float32 [tile, tile], positive. Raises ValueError where the tiles leave the canvas or do not
        cover it.
        """
        ...

    def with_weights(self, mean: Mean, weights: np.ndarray) -> Mean:
        """The same canvas, for tiles that are weighted by other `weights` over the same sum of weights."""
        ...

    def upload(self, image: np.ndarray, factor: int = 1) -> Canvas:
        """Copy an image [H, W, C] of uint8 or uint16; the array may be kept, and must not change."""
        ...

    def gaussian(self, canvas: Canvas, seed: int, step: int) -> None:
        """Fill a latent with the noise of `moesr.runtime.sampling.noise`."""
        ...

    def gather(self, slots: Sequence[Slot], buffers: Mapping[str, Any]) -> None:
        """Fill a graph's inputs, one tile a slot. An input with one value for the run takes the first's."""
        ...

    def blend(self, slots: Sequence[Slot], output: Any) -> None:
        """Add a graph's output, one tile a slot, to the slots' targets."""
        ...

    def tick(self, slots: Sequence[Slot], session: Session, buffers: Mapping[str, Any]) -> None:
        """Gather, run the graph, blend its first output, keep others; it is bound to these buffers."""
        ...

    def advance(
        self, z: Canvas, out: Mean, c: Coefficients, seed: int, step: int, history: Canvas | None = None
    ) -> None:
        """Move `z` by one step: `c_z * z + c_out * out + c_noise * noise(seed, step)`; clears `out`.

        With a `history`, `c_history` times it comes along, and it becomes `x_z * z + x_out * out`.
        """
        ...

    def mix(self, z: Canvas, other: Canvas, c_z: float, c_other: float) -> None:
        """Replace `z` by `c_z * z + c_other * other`."""
        ...

    def finite(self, mean: Mean) -> bool:
        """Whether all values blended so far were finite. Waits for the device."""
        ...

    def download(self, canvas: Canvas) -> np.ndarray:
        """The canvas as a host array, float32 [C, H, W], that the caller may change. Waits for the device."""
        ...

    def close(self) -> None:
        """Give all memory back; nothing is used afterwards."""
        ...


class Session(Protocol):
    """A graph ready to run. It knows nothing of jobs, and one thread at a time uses it."""

    @property
    def boundary(self) -> Boundary:
        """The inputs and outputs that the graph has."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether `enqueue` does no more than add work to the stream of its buffers' device."""
        ...

    def bind(self, buffers: Mapping[str, Any], max_batch: int) -> None:
        """Run between these buffers from now on: one by name for each input and output, `max_batch` long."""
        ...

    def enqueue(self, batch: int) -> None:
        """Run on the first `batch` tiles of the inputs; on the host, done when it returns.

        Raises MemoryLimitError where the memory ran out, EngineError for any other failure.
        """
        ...

    def abort(self) -> None:
        """Have a run under way in another thread end with EngineError; no further one will succeed."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...
