"""Jobs and the scheduler that runs them together.

A job is one image. It passes through two phases, each a list of tiles to run through a graph: `Sampling`
(every step visits all tiles of the latent canvas, blends their eps, then moves the whole canvas by one step
of the sampler; StableSR's progressive aggregation) and `Decoding` (every tile once, blended in pixels).
The scheduler picks the graph that the oldest job needs and fills a batch with tiles of all jobs in flight
that need the same one. All arrays are made when a phase begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from moesr.runtime import noise, samplers, tiles
from moesr.runtime.errors import MoesrError
from moesr.runtime.manifest import Graph, Manifest
from moesr.runtime.residency import Residency
from moesr.runtime.schedule import StepTable, step_table
from moesr.runtime.sessions import Session, require_finite

SAMPLING_OVERLAP = 4  # neighbours share a quarter of a tile at every step
DECODING_OVERLAP = 8  # and an eighth when decoding, which happens once
_SAMPLING, _DECODING = "sampling", "decoding"


@dataclass(frozen=True)
class Settings:
    """Options of a job, already checked (see `moesr.runtime.upscaler`)."""

    steps: int
    sampler: str
    seed: int
    color_fix: str
    fidelity: float  # 0 (free) .. 1 (faithful to the LR image)


class Sampling:
    """From noise to a clean latent, one step over all tiles at a time."""

    stage = _SAMPLING

    def __init__(self, manifest: Manifest, table: StepTable, cond: np.ndarray, settings: Settings) -> None:
        """`cond` is the condition on the latent grid: float32 [3, h, w] in [-1, 1], at least a tile."""
        height, width = cond.shape[1:]
        shape = (manifest.latent_channels, height, width)
        self._manifest, self._table, self._cond, self._seed = manifest, table, cond, settings.seed
        self._tile = manifest.latent_tile
        self.tiles = sampling_grid(manifest, height, width)
        self.z = noise.gaussian(settings.seed, noise.INITIAL_NOISE, shape)
        self._eps = tiles.Blend(shape, self.tiles, self._tile, tiles.gaussian_weights(self._tile))
        self._noise, self._scratch = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._step = 0
        self.cursor = 0  # tiles of this step that are done

    @property
    def graph(self) -> Graph:
        """The expert that serves the current step."""
        return self._manifest.experts[self._table.expert[self._step]]

    @property
    def upcoming(self) -> Graph:
        """The graph needed after this one."""
        later = self._table.expert[self._step :]
        others = later[later != later[0]]
        return self._manifest.experts[others[0]] if others.size else self._manifest.decoder

    @property
    def group(self) -> Hashable:
        """Tiles of equal group may share a batch."""
        return self.graph.file

    @property
    def done(self) -> bool:
        """Whether every step was taken."""
        return self._step == len(self._table)

    def fill(self, session: Session, slot: int, tile: int) -> None:
        """Copy a tile's inputs into a slot of the batch."""
        window = self._window(tile)
        inputs = session.inputs
        inputs["z_t"][slot] = self.z[window]
        inputs["cond"][slot] = self._cond[window]
        inputs["t"][slot] = self._table.t[self._step]

    def accept(self, tile: int, eps: np.ndarray) -> None:
        """Take a tile's prediction, [C, h, w]; with the last one, move the canvas by one sampler step."""
        self._eps.add(*self.tiles[tile], eps)
        self.cursor += 1
        if self.cursor < len(self.tiles):
            return
        c = samplers.coefficients(self._table, self._step)
        added = noise.gaussian(self._seed, self._step, self.z.shape, self._noise) if c.c_noise else None
        samplers.advance(self.z, self._eps.result(), added, c, self._scratch)
        self._eps.reset()
        self.cursor = 0
        self._step += 1

    def _window(self, tile: int) -> tuple[slice, slice, slice]:
        y, x = self.tiles[tile]
        return slice(None), slice(y, y + self._tile), slice(x, x + self._tile)


class Decoding:
    """From a clean latent to pixels, tile by tile."""

    stage = _DECODING

    def __init__(self, manifest: Manifest, z: np.ndarray, lr: np.ndarray, fidelity: float) -> None:
        """`z` [C, h, w]; `lr` the input at output size, uint8 or uint16 [H, W, 3]."""
        height, width = z.shape[1:]
        self._z, self._lr, self._fidelity = z, lr, fidelity
        self._tile, self._factor, self.graph = manifest.latent_tile, manifest.latent_factor, manifest.decoder
        self.tiles = decoding_grid(manifest, height, width)
        origins = [(y * self._factor, x * self._factor) for y, x in self.tiles]
        overlap = manifest.latent_tile // DECODING_OVERLAP * self._factor
        weights = tiles.feather_weights(manifest.tile, overlap)
        self._image = tiles.Blend((3, *lr.shape[:2]), origins, manifest.tile, weights)
        self.cursor = 0

    upcoming = None

    @property
    def group(self) -> Hashable:
        """Tiles of equal group may share a batch: the fidelity is one value a batch."""
        return self.graph.file, self._fidelity

    @property
    def done(self) -> bool:
        """Whether every tile is decoded."""
        return self.cursor == len(self.tiles)

    @property
    def image(self) -> np.ndarray:
        """The decoded canvas: float32 [3, H, W], about [-1, 1]."""
        return self._image.result()

    def fill(self, session: Session, slot: int, tile: int) -> None:
        """Copy a tile's inputs into a slot of the batch."""
        y, x = self.tiles[tile]
        inputs = session.inputs
        inputs["z"][slot] = self._z[:, y : y + self._tile, x : x + self._tile]
        if "lr" in inputs:
            (top, left), size = (y * self._factor, x * self._factor), self._tile * self._factor
            to_unit(self._lr[top : top + size, left : left + size].transpose(2, 0, 1), inputs["lr"][slot])
        if "fidelity" in inputs:
            inputs["fidelity"][0] = self._fidelity

    def accept(self, tile: int, image: np.ndarray) -> None:
        """Take a decoded tile, [3, H, W]."""
        y, x = self.tiles[tile]
        self._image.add(y * self._factor, x * self._factor, image)
        self.cursor += 1


class Job:
    """One image on its way. `image` is the result, float32 [3, H, W], once `done` without an `error`."""

    def __init__(self, manifest: Manifest, cond: np.ndarray, lr: np.ndarray, settings: Settings) -> None:
        """`cond` float32 [3, h, w] on the latent grid, `lr` uint8 or uint16 [H, W, 3] at output size.

        MoesrError or ValueError where the settings do not fit the schedule.
        """
        eta = samplers.ETA[settings.sampler]
        table = step_table(manifest.schedule, settings.steps, eta, manifest.expert_ranges)
        self._manifest, self._settings, self.lr = manifest, settings, lr
        self.phase: Sampling | Decoding = Sampling(manifest, table, cond, settings)
        self.total = work_units(manifest, cond.shape[1], cond.shape[2], settings.steps)
        self.units = 0  # tiles run so far
        self.done = False
        self.error: BaseException | None = None

    @property
    def image(self) -> np.ndarray:
        """The decoded canvas."""
        assert isinstance(self.phase, Decoding)
        return self.phase.image

    def accept(self, tile: int, output: np.ndarray) -> None:
        """Hand a tile's result to the phase, and move on where that ends it."""
        self.phase.accept(tile, output)
        self.units += 1
        if not self.phase.done:
            return
        if isinstance(self.phase, Sampling):
            self.phase = Decoding(self._manifest, self.phase.z, self.lr, self._settings.fidelity)
        else:
            self.done = True


class Scheduler:
    """Runs jobs of any number of threads; each thread that waits for its job advances all of them."""

    def __init__(self, residency: Residency, precision: str) -> None:
        self._residency, self._precision = residency, precision
        self._jobs: list[Job] = []  # the oldest first
        self._lock = threading.Lock()

    def submit(self, job: Job) -> None:
        """Put a job in flight. The caller must `run` or `cancel` it."""
        with self._lock:
            self._jobs.append(job)

    def cancel(self, job: Job) -> None:
        """Forget a job, whether or not it is in flight."""
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)

    def run(self, job: Job, progress: Callable[[], None]) -> None:
        """Work until `job` is done, calling `progress` after each batch; raises what made the job fail."""
        while not job.done:
            with self._lock:
                if not job.done:
                    self._tick()
            progress()
        if job.error:
            raise job.error

    def _tick(self) -> None:
        """Run one batch for the oldest job, filled up with tiles of the others."""
        batch: list[tuple[Job, int]] = [(self._jobs[0], self._jobs[0].phase.cursor)]
        try:
            phase = self._jobs[0].phase
            session = self._residency.get(phase.graph, phase.upcoming)
            batch = self._pick(phase.group, session.max_batch)
            for slot, (job, tile) in enumerate(batch):
                job.phase.fill(session, slot, tile)
            outputs = session.run(len(batch))
            require_finite(outputs, phase.graph, self._precision)
            for (job, tile), output in zip(batch, outputs, strict=True):
                job.accept(tile, output)
        except (MoesrError, MemoryError) as error:
            for job, _ in batch:
                job.error, job.done = error, True
        self._jobs = [job for job in self._jobs if not job.done]

    def _pick(self, group: Hashable, limit: int) -> list[tuple[Job, int]]:
        """Up to `limit` outstanding tiles of one group, the oldest job's first."""
        batch: list[tuple[Job, int]] = []
        for job in self._jobs:
            if job.phase.group == group:
                left = range(job.phase.cursor, len(job.phase.tiles))
                batch.extend((job, tile) for tile in left[: limit - len(batch)])
        return batch


def to_unit(pixels: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Map uint8 or uint16 values to [-1, 1] in `out`, float32 of the same shape."""
    np.multiply(pixels, np.float32(2.0 / np.iinfo(pixels.dtype).max), out=out)
    return np.subtract(out, np.float32(1.0), out=out)


def sampling_grid(manifest: Manifest, height: int, width: int) -> list[tuple[int, int]]:
    """Tiles of a step over a latent canvas."""
    return tiles.grid(height, width, manifest.latent_tile, manifest.latent_tile // SAMPLING_OVERLAP)


def decoding_grid(manifest: Manifest, height: int, width: int) -> list[tuple[int, int]]:
    """Tiles to decode, in latent pixels."""
    return tiles.grid(height, width, manifest.latent_tile, manifest.latent_tile // DECODING_OVERLAP)


def work_units(manifest: Manifest, height: int, width: int, steps: int) -> int:
    """Runs of a graph on one tile that a latent canvas takes in all."""
    return steps * len(sampling_grid(manifest, height, width)) + len(decoding_grid(manifest, height, width))
