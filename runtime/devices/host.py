"""The host as a device: it computes with NumPy arrays, and every call is complete when it returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
        self._scratch = np.empty(noise.BLOCK, np.float32)

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
        *,
        wraps: bool = False,
    ) -> Mean:
        """See `Device.mean`."""
        weight_sum = tiles.weight_sum(shape[1], shape[2], _pixels(origins, factor), weights, wraps=wraps)
        state = _State(np.empty_like(weights), np.empty((shape[0], *weights.shape), np.float32))
        data = np.zeros(shape, np.float32)
        return Mean(data, factor, weights=weights, weight_sum=weight_sum, state=state, wraps=wraps)

    def with_weights(self, mean: Mean, weights: np.ndarray) -> Mean:
        """See `Device.with_weights`."""
        return replace(mean, weights=weights)

    def with_origins(self, mean: Mean, origins: Sequence[tuple[int, int]], weights: np.ndarray) -> Mean:
        """See `Device.with_origins`."""
        _, height, width = mean.data.shape
        weight_sum = tiles.weight_sum(height, width, _pixels(origins, mean.factor), weights, wraps=mean.wraps)
        return replace(mean, weight_sum=weight_sum)

    def upload(self, image: np.ndarray, factor: int = 1) -> Canvas:
        """See `Device.upload`; the array itself is kept."""
        return Canvas(image, factor)

    def fill(self, canvas: Canvas, values: np.ndarray) -> None:
        """See `Device.fill`."""
        canvas.data[...] = values

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
            for (rows, columns), part in _pieces(mean, slot, tile.shape, mean.data.shape[1:]):
                # Dividing here needs no second canvas, and w / w is exactly 1 for pixels of one tile alone.
                weights, scratch = state.normalised_weights[part], state.scratch[:, *part]
                np.divide(mean.weights[part], mean.weight_sum[rows, columns], out=weights)
                np.multiply(tile[:, *part], weights, out=scratch)
                window = mean.data[:, rows, columns]
                np.add(window, scratch, out=window)

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
        flat = [array.reshape(-1) for array in (z.data, out.data)]
        past = history.data.reshape(-1) if history else None
        size = flat[0].size
        parts = noise.blocks(seed, step, size) if c.c_noise else ((at, None) for at in _starts(size))
        for start, added in parts:
            rows = slice(start, start + (len(self._scratch) if added is None else added.size))
            z_part, out_part = flat[0][rows], flat[1][rows]
            scratch = self._scratch[: z_part.size]
            samplers.advance(z_part, out_part, added, c, scratch, None if past is None else past[rows])
        out.data.fill(0.0)

    def mix(self, z: Canvas, other: Canvas, c_z: float, c_other: float) -> None:
        """See `Device.mix`."""
        c = Coefficients(np.float32(c_z), np.float32(c_other), np.float32(0.0))
        first, second = z.data.reshape(-1), other.data.reshape(-1)
        for start in _starts(first.size):
            part = first[start : start + noise.BLOCK]
            samplers.advance(part, second[start : start + noise.BLOCK], None, c, self._scratch[: part.size])

    def finite(self, mean: Mean) -> bool:
        """See `Device.finite`."""
        return mean.state.finite

    def download(self, canvas: Canvas, rows: slice | None = None) -> np.ndarray:
        """See `Device.download`: the array itself, or a part of it."""
        return canvas.data if rows is None else canvas.data[:, rows]

    def close(self) -> None:
        """See `Device.close`."""


def _starts(size: int) -> range:
    return range(0, size, noise.BLOCK)


def _pixels(origins: Sequence[tuple[int, int]], factor: int) -> list[tuple[int, int]]:
    return [(y * factor, x * factor) for y, x in origins]


def _pieces(
    canvas: Canvas, slot: Slot, shape: tuple[int, ...], sides: tuple[int, ...]
) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Rows and columns of a canvas under a slot's tile [C, h, w], and the part of the tile there.

    There are several such pieces if the tile goes on at the opposite side of the canvas.
    """
    rows = tiles.runs((slot.y - canvas.top) * canvas.factor, shape[1], sides[0])
    columns = tiles.runs(slot.x * canvas.factor, shape[2], sides[1])
    return (((r, c), (of_r, of_c)) for r, of_r in rows for c, of_c in columns)


def _read(canvas: Canvas, slot: Slot, out: np.ndarray) -> None:
    latent = canvas.data.dtype == np.float32
    sides = canvas.data.shape[1:] if latent else canvas.data.shape[:2]
    for (rows, columns), part in _pieces(canvas, slot, out.shape, sides):
        if latent:
            out[:, *part] = canvas.data[:, rows, columns]
        else:
            to_unit(canvas.data[rows, columns].transpose(2, 0, 1), out[:, *part])
