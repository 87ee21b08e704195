"""The protocols of devices and sessions: memory for canvases, the operations around a graph, and graphs.

A tick is one run of one graph over a few slots, and its operations are always the same: `gather` fills the
graph's inputs from the canvases that the slots name, the session runs, `blend` adds its output to the sums of
the canvases, and if that completes a step of an image, `advance` moves its latent by one step of the sampler.
Only the slots differ from tick to tick. Only `finite` and `download` return values to the host, so the host
can be ahead of an asynchronous device.
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
    `factor` is the number of its pixels per latent pixel, along one side. A factor of 0 marks a canvas that
    belongs to a single tile, at any position. A canvas that holds a part of the rows begins at the latent row
    `top`.
    """

    data: Any
    factor: int = 1
    top: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Mean(Canvas):
    """A canvas made of tiles, as their mean with weights `weights` [tile, tile] over `weight_sum` [H, W].

    `state` is private to the device; it includes a flag that is set if a value is not finite. With `wraps`
    tiles go on at the opposite side of the canvas.
    """

    weights: Any
    weight_sum: Any
    state: Any
    wraps: bool = False


@dataclass(frozen=True, eq=False)
class Slot:
    """A row of a tick's table: the sources of one tile's inputs, and the target of its output.

    `sources` and `scalars` are keyed by the graph's inputs; (y, x) is the tile's origin on the latent grid.
    `keeps` maps further outputs of the graph to the canvases of this tile to which they are copied.
    """

    sources: Mapping[str, Canvas]
    scalars: Mapping[str, float]
    target: Mean
    y: int
    x: int
    keeps: Mapping[str, Canvas] = field(default_factory=dict)


class Device(Protocol):
    """The memory of one processor and the operations of a tick. One thread at a time uses it."""

    @property
    def synchronous(self) -> bool:
        """Whether every call is complete when it returns, so that results can be read between ticks."""
        ...

    @property
    def stream(self) -> int | None:
        """The handle of the stream on which sessions enqueue their runs; None if a run is a plain call."""
        ...

    @property
    def free_bytes(self) -> Callable[[], int] | None:
        """A function for any thread that returns the free bytes of the device; None if it is the host."""
        ...

    def buffer(self, spec: TensorSpec, batch: int) -> Any:
        """Allocate a graph's input or output for `batch` tiles, to be bound to a session."""
        ...

    def canvas(self, shape: tuple[int, int, int], factor: int = 1) -> Canvas:
        """Allocate a latent of zeros, float32 [C, H, W]."""
        ...

    def mean(
        self,
        shape: tuple[int, int, int],
        origins: Sequence[tuple[int, int]],
        weights: np.ndarray,
        factor: int = 1,
        *,
        wraps: bool = False,
    ) -> Mean:
        """Allocate a canvas [C, H, W] for tiles at `origins` on the latent grid.

        `weights` are float32 [tile, tile], positive. Raises ValueError if the tiles do not cover the canvas,
        or leave it unless it `wraps`; UsageError if it wraps and the device knows no such canvases.
        """
        ...

    def with_weights(self, mean: Mean, weights: np.ndarray) -> Mean:
        """Return the same canvas for tiles with other `weights`, over the same sum of weights."""
        ...

    def with_origins(self, mean: Mean, origins: Sequence[tuple[int, int]], weights: np.ndarray) -> Mean:
        """The same canvas for tiles at other `origins`, with `weights` as they were given to `mean`.

        ValueError as for `mean`. The canvas holds no sums at this time.
        """
        ...

    def upload(self, image: np.ndarray, factor: int = 1) -> Canvas:
        """Copy an image [H, W, C] of uint8 or uint16. The array may be kept, so it must not change."""
        ...

    def fill(self, canvas: Canvas, values: np.ndarray) -> None:
        """Copy a host array into a latent of the same shape, float32 [C, H, W]."""
        ...

    def gaussian(self, canvas: Canvas, seed: int, step: int) -> None:
        """Fill a latent with the noise of `moesr.runtime.sampling.noise`."""
        ...

    def gather(self, slots: Sequence[Slot], buffers: Mapping[str, Any]) -> None:
        """Fill a graph's inputs, one tile per slot; an input with one value per run gets the first slot's."""
        ...

    def blend(self, slots: Sequence[Slot], output: Any) -> None:
        """Add a graph's output, one tile per slot, to the slots' targets."""
        ...

    def tick(self, slots: Sequence[Slot], session: Session, buffers: Mapping[str, Any]) -> None:
        """Gather, run the graph, blend its first output and keep the others.

        The session must be bound to these buffers.
        """
        ...

    def advance(
        self, z: Canvas, out: Mean, c: Coefficients, seed: int, step: int, history: Canvas | None = None
    ) -> None:
        """Replace `z` by `c_z * z + c_out * out + c_noise * noise(seed, step)`, and clear `out`.

        With a `history`, `c_history * history` is added, and `history` becomes `x_z * z + x_out * out`.
        """
        ...

    def mix(self, z: Canvas, other: Canvas, c_z: float, c_other: float) -> None:
        """Replace `z` by `c_z * z + c_other * other`."""
        ...

    def finite(self, mean: Mean) -> bool:
        """Return True if all values that were blended so far are finite. Waits for the device."""
        ...

    def download(self, canvas: Canvas, rows: slice | None = None) -> np.ndarray:
        """The canvas, or some rows of it, as a host array: float32 [C, H, W]. Waits for the device.

        The caller may change the array.
        """
        ...

    def close(self) -> None:
        """Release all memory. The device must not be used afterwards."""
        ...


class Session(Protocol):
    """A graph that is ready to run. It has no access to jobs, and one thread at a time uses it."""

    @property
    def boundary(self) -> Boundary:
        """The inputs and outputs of the graph."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether `enqueue` only adds work to the device's stream, so that it can be captured."""
        ...

    def bind(self, buffers: Mapping[str, Any], max_batch: int) -> None:
        """Run between these buffers from now on: one per input and output by name, `max_batch` tiles long."""
        ...

    def enqueue(self, batch: int) -> None:
        """Run on the first `batch` tiles of the inputs. On the host the run is complete when it returns.

        Raises MemoryLimitError if the memory ran out, and EngineError for any other failure.
        """
        ...

    def abort(self) -> None:
        """Make a run that is under way in another thread, and all later ones, end with EngineError."""
        ...

    def close(self) -> None:
        """Release the memory."""
        ...
