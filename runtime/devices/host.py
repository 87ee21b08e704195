"""The host as a device: it computes with NumPy arrays, and every call is complete when it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesr.runtime.devices.interface import Canvas, Mean, Session, Slot
from moesr.runtime.engine.graph_spec import TensorSpec
from moesr.runtime.images.planes import to_unit
from moesr.runtime.sampling import noise, samplers, tiles
from moesr.runtime.sampling.samplers import Coefficients


@dataclass
class _State:
    """The state of a mean on the host."""

    normalised_weights: np.ndarray  # [tile, tile]
    scratch: np.ndarray  # [C, tile, tile]
    finite: bool = True


class HostDevice:
    """A `Device` on the host. Buffers and canvases are NumPy arrays."""

    synchronous, stream, free_bytes = True, None, None

    def __init__(self) -> None:
        self._scratch = np.empty(0, np.float32)

    def buffer(self, spec: TensorSpec, batch: int) -> np.ndarray:
        """See `Device.buffer`."""
        return np.zeros(spec.shape(batch), spec.dtype)

    def canvas(self, shape: tuple[int, int, int], factor: int = 1) -> Canvas:
        """See `Device.canvas`."""
        return Canvas(np.zeros(shape, np.float32), factor)

    def mean(
        self,
        shape: tuple[int, int, int],
        origins: Sequence[tuple[int, int]],
        weights: np.ndarray,
        factor: int = 1,
    ) -> Mean:
        """See `Device.mean`."""
        pixels = [(y * factor, x * factor) for y, x in origins]
        weight_sum = tiles.weight_sum(shape[1], shape[2], pixels, weights)
        state = _State(np.empty_like(weights), np.empty((shape[0], *weights.shape), np.float32))
        data = np.zeros(shape, np.float32)
        return Mean(data, factor, weights=weights, weight_sum=weight_sum, state=state)

    def with_weights(self, mean: Mean, weights: np.ndarray) -> Mean:
        """See `Device.with_weights`."""
        return replace(mean, weights=weights)

    def upload(self, image: np.ndarray, factor: int = 1) -> Canvas:
        """See `Device.upload`; the array itself is kept."""
        return Canvas(image, factor)

    def gaussian(self, canvas: Canvas, seed: int, step: int) -> None:
        """See `Device.gaussian`."""
        noise.gaussian(seed, step, canvas.data.shape, canvas.data)

    def gather(self, slots: Sequence[Slot], buffers: Mapping[str, np.ndarray]) -> None:
        """See `Device.gather`."""
        for i, slot in enumerate(slots):
            for name, canvas in slot.sources.items():
                _read(canvas, slot, buffers[name][i])
            for name, value in slot.scalars.items():
                buffers[name][i % len(buffers[name])] = value

    def blend(self, slots: Sequence[Slot], output: np.ndarray) -> None:
        """See `Device.blend`."""
        for slot, tile in zip(slots, output, strict=False):
            mean, state = slot.target, slot.target.state
            if not (math.isfinite(float(tile.min())) and math.isfinite(float(tile.max()))):
                state.finite = False
            rows, columns = _window(mean, slot, tile.shape)
            # Dividing here needs no second canvas, and w / w is exactly 1 for pixels that one tile covers.
            np.divide(mean.weights, mean.weight_sum[rows, columns], out=state.normalised_weights)
            np.multiply(tile, state.normalised_weights, out=state.scratch)
            window = mean.data[:, rows, columns]
            np.add(window, state.scratch, out=window)

    def tick(self, slots: Sequence[Slot], session: Session, buffers: Mapping[str, np.ndarray]) -> None:
        """See `Device.tick`."""
        self.gather(slots, buffers)
        session.enqueue(len(slots))
        self.blend(slots, buffers[session.boundary.outputs[0].name])
        self.keep(slots, buffers)

    def keep(self, slots: Sequence[Slot], buffers: Mapping[str, np.ndarray]) -> None:
        """Copy the further outputs to the canvases that the slots name."""
        for i, slot in enumerate(slots):
            for name, canvas in slot.keeps.items():
                canvas.data[...] = buffers[name][i]

    def advance(
        self, z: Canvas, out: Mean, c: Coefficients, seed: int, step: int, history: Canvas | None = None
    ) -> None:
        """See `Device.advance`."""
        first, second = self._two_like(z.data)
        added = noise.gaussian(seed, step, z.data.shape, first) if c.c_noise else None
        samplers.advance(z.data, out.data, added, c, second, history.data if history else None)
        out.data.fill(0.0)

    def mix(self, z: Canvas, other: Canvas, c_z: float, c_other: float) -> None:
        """See `Device.mix`."""
        c = Coefficients(np.float32(c_z), np.float32(c_other), np.float32(0.0))
        samplers.advance(z.data, other.data, None, c, self._two_like(z.data)[0])

    def finite(self, mean: Mean) -> bool:
        """See `Device.finite`."""
        return mean.state.finite

    def download(self, canvas: Canvas) -> np.ndarray:
        """See `Device.download`; the array itself is returned."""
        return canvas.data

    def close(self) -> None:
        """See `Device.close`."""
        self._scratch = np.empty(0, np.float32)

    def _two_like(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return two work arrays of that shape; they are allocated again only for a larger canvas."""
        if self._scratch.size < 2 * array.size:
            self._scratch = np.empty(2 * array.size, np.float32)
        first, second = self._scratch[: array.size], self._scratch[array.size : 2 * array.size]
        return first.reshape(array.shape), second.reshape(array.shape)


def _window(canvas: Canvas, slot: Slot, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Return the rows and columns of a slot's tile on a canvas, for a tile [C, h, w]."""
    top, left = slot.y * canvas.factor, slot.x * canvas.factor
    return slice(top, top + shape[1]), slice(left, left + shape[2])


def _read(canvas: Canvas, slot: Slot, out: np.ndarray) -> None:
    rows, columns = _window(canvas, slot, out.shape)
    if canvas.data.dtype == np.float32:
        out[...] = canvas.data[:, rows, columns]
    else:
        to_unit(canvas.data[rows, columns].transpose(2, 0, 1), out)
