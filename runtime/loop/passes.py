"""What an image goes through: encode, denoise, decode, each a list of tiles to run through a graph.

Encoding makes the latent that conditions the sampler, where the model has an encoder; every tile runs once.
Sampling visits all tiles of the latent canvas at every step, blends their predictions, then moves the whole
canvas by one step of the sampler (StableSR's progressive aggregation); with guidance it visits every tile
once a prompt. Decoding runs every tile once and blends in pixels. A pass allocates its canvases when it
begins; it is driven from the worker's thread alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import replace
from typing import ClassVar

import numpy as np

from moesr.runtime.devices.interface import Canvas, Device, Mean, Slot
from moesr.runtime.engine.graph_io import DECODER, DEEP, ENCODER, deep_size
from moesr.runtime.engine.graph_spec import Graph
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.loop.tile_layout import CODING_OVERLAP, Grid, coding_grid, sampling_grid, sampling_window
from moesr.runtime.sampling import noise, samplers, tiles
from moesr.runtime.sampling.schedule import StepTable, full_steps


class Pass(ABC):
    """Tiles of one image that need a graph. `cursor` counts those of this round that ran."""

    stage: ClassVar[str]

    def __init__(
        self,
        manifest: Manifest,
        tiles: Grid,
        target: Mean,
        sources: dict[str, Canvas],
        scalars: dict[str, float],
    ) -> None:
        """`sources` and `scalars` are what the pass can feed to its graphs, by input."""
        self.tiles, self.target, self.cursor, self.done = tiles, target, 0, False
        self._manifest, self._sources, self._scalars = manifest, sources, scalars

    @property
    @abstractmethod
    def role(self) -> str:
        """The graph that the next tiles need."""

    @property
    def upcoming(self) -> str | None:
        """The graph that this pass needs after it, if it needs another one."""
        return None

    @property
    def graph(self) -> Graph:
        """The manifest's entry of `role`."""
        return self._manifest.graphs[self.role]

    @property
    def group(self) -> Hashable:
        """Tiles of equal group may share a tick: one graph, and equal values of what a run has one of."""
        single = (i.name for i in self.graph.inputs if not i.per_tile)
        return self.role, *(self._scalars[name] for name in single)

    def slot(self, tile: int) -> Slot:
        """The row of a tick's table for one tile."""
        taken = [spec.name for spec in self.graph.inputs]
        sources = {name: self._sources[name] for name in taken if name in self._sources}
        scalars = {name: self._scalars[name] for name in taken if name in self._scalars}
        return Slot(sources, scalars, self.target, *self.tiles[tile])

    def ran(self, count: int) -> None:
        """Take note that the next `count` tiles are blended; with the last one, end the round."""
        self.cursor += count
        if self.cursor == len(self.tiles):
            self.cursor = 0
            self._end_round()

    def _end_round(self) -> None:
        self.done = True


class Encoding(Pass):
    """From the image to the latent that conditions the sampler: `target`."""

    stage = "encoding"

    def __init__(
        self, manifest: Manifest, device: Device, lr: Canvas, size: tuple[int, int], seed: int
    ) -> None:
        """`lr` is the input at output size, `size` that of the latent canvas."""
        grid = coding_grid(manifest, *size)
        shape = (manifest.latent_channels, *size)
        weights = tiles.feather_weights(manifest.latent_tile, manifest.latent_tile // CODING_OVERLAP)
        sources = {"image": lr}
        if any(spec.name == "noise" for spec in manifest.graphs[ENCODER].inputs):
            sources["noise"] = device.canvas(shape)
            device.gaussian(sources["noise"], seed, noise.ENCODING_NOISE)
        super().__init__(manifest, grid, device.mean(shape, grid, weights), sources, {})

    @property
    def role(self) -> str:
        """The encoder."""
        return ENCODER


class Sampling(Pass):
    """From noise, or from the noised condition, to a clean latent: `z`."""

    stage = "sampling"

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        table: StepTable,
        cond: Canvas,
        size: tuple[int, int],
        seed: int,
        guidance: float = 1.0,
        reuse: int = 1,
    ) -> None:
        """`cond` covers the latent canvas of `size`; one step in `reuse` is full."""
        grid, gains = sampling_grid(manifest, *size), prompt_gains(guidance)
        shape = (manifest.latent_channels, *size)
        weights = sampling_window(manifest)
        self.z = device.canvas(shape)
        sources, target = {"z_t": self.z, "cond": cond}, device.mean(shape, grid, weights)
        super().__init__(manifest, grid * len(gains), target, sources, {"t": float(table.t[0])})
        self._shares = {
            prompt: target if gain == 1.0 else device.with_weights(target, np.float32(gain) * weights)
            for prompt, gain in gains.items()
        }
        self._device, self._table, self._seed, self._step = device, table, seed, 0
        self._history = device.canvas(shape) if table.extrapolation.any() else None
        self._roles = step_roles(manifest, table, reuse)
        deep = manifest.deep if reuse > 1 else None
        self._deep = [device.canvas(deep_size(deep), 0) for _ in self.tiles] if deep else []
        device.gaussian(self.z, seed, noise.INITIAL_NOISE)
        if manifest.init == "latent":
            signal = float(manifest.schedule.alpha_bar[-1])
            device.mix(self.z, cond, math.sqrt(1.0 - signal), math.sqrt(signal))

    @property
    def role(self) -> str:
        """The expert that serves the current step, or its shallow graph."""
        return self._roles[min(self._step, len(self._roles) - 1)]

    @property
    def upcoming(self) -> str | None:
        """The graph that follows."""
        later = self._roles[self._step :]
        return next((role for role in later if role != later[0]), None)

    def slot(self, tile: int) -> Slot:
        """The row for one tile and prompt; all tiles of a prompt come before those of the next."""
        prompt = list(self._shares)[tile * len(self._shares) // len(self.tiles)]
        self._scalars["prompt"] = float(prompt)
        if not self._deep:
            return replace(super().slot(tile), target=self._shares[prompt])
        self._sources[DEEP] = self._deep[tile]
        leaves = any(spec.name == DEEP for spec in self.graph.outputs)
        keeps = {DEEP: self._deep[tile]} if leaves else {}
        return replace(super().slot(tile), target=self._shares[prompt], keeps=keeps)

    def _end_round(self) -> None:
        """Move the canvas by one step of the sampler."""
        c = samplers.coefficients(self._table, self._step, self._manifest.prediction)
        self._device.advance(self.z, self.target, c, self._seed, self._step, self._history)
        self._step += 1
        self.done = self._step == len(self._table)
        if not self.done:
            self._scalars["t"] = float(self._table.t[self._step])


class Decoding(Pass):
    """From a clean latent to pixels: `target`."""

    stage = "decoding"

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        z: Canvas,
        lr: Canvas,
        size: tuple[int, int],
        fidelity: float,
    ) -> None:
        """`z` the latent canvas of `size`, `lr` the input at output size."""
        grid, factor = coding_grid(manifest, *size), manifest.latent_factor
        overlap = manifest.latent_tile // CODING_OVERLAP * factor
        weights = tiles.feather_weights(manifest.tile, overlap)
        target = device.mean((3, size[0] * factor, size[1] * factor), grid, weights, factor)
        super().__init__(manifest, grid, target, {"z": z, "lr": lr}, {"fidelity": fidelity})

    @property
    def role(self) -> str:
        """The decoder."""
        return DECODER


def step_roles(manifest: Manifest, table: StepTable, reuse: int) -> list[str]:
    """The graph of every step, one in `reuse` being full; a manifest without shallow graphs takes 1."""
    experts = [manifest.experts[k] for k in table.expert]
    full = full_steps(table.expert, reuse)
    return [e.graph if f else e.shallow or e.graph for e, f in zip(experts, full, strict=True)]


def prompt_gains(guidance: float) -> dict[int, float]:
    """What the prediction for each prompt counts for: `guidance` to follow the first and avoid the second.

    `out = out_1 + guidance * (out_0 - out_1)` (Ho and Salimans, 2021; StableSR, Eq. 8). A prompt that counts
    for nothing is left out.
    """
    gains = {0: guidance, 1: 1.0 - guidance}
    return {prompt: gain for prompt, gain in gains.items() if gain}
