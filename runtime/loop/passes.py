"""The passes of one image: encode, denoise, decode. Each is a list of tiles that run through a graph.

Encoding makes the latent that conditions the sampler, if the model has an encoder; every tile runs once.
Sampling visits all tiles of the latent canvas at every step, blends their predictions, then moves the whole
canvas by one step of the sampler (StableSR's progressive aggregation). The grid of tiles may move from step
to step. With guidance it visits every tile once per prompt. Decoding runs every tile once and blends in
pixels. A pass allocates its canvases when it begins, and only the worker's thread uses it.
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
from moesr.runtime.loop.sampling_watch import SamplingStep, Watch
from moesr.runtime.loop.saved_steps import SavedSteps, State
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import Grid, TileLayout
from moesr.runtime.sampling import noise, samplers
from moesr.runtime.sampling.schedule import StepTable, full_steps


class Pass(ABC):
    """Tiles of one image that need a graph, in rounds: a round runs every tile once.

    `taken` counts the tiles of this round that were given to ticks, `cursor` those that are blended. They
    differ while ticks are in flight.
    """

    stage: ClassVar[str]

    def __init__(
        self,
        manifest: Manifest,
        tiles: Grid,
        target: Mean,
        sources: dict[str, Canvas],
        scalars: dict[str, float],
    ) -> None:
        """Make a pass; `sources` and `scalars` are all values that it can feed to its graphs, by input."""
        self.tiles, self.target, self.done = tiles, target, False
        self.taken = self.cursor = 0
        self._manifest, self._sources, self._scalars = manifest, sources, scalars

    @property
    @abstractmethod
    def role(self) -> str:
        """The graph that the next tiles need."""

    @property
    def upcoming(self) -> str | None:
        """The graph that this pass needs next; None if it needs no other graph."""
        return None

    @property
    def graph(self) -> Graph:
        """The manifest's entry for `role`."""
        return self._manifest.graphs[self.role]

    @property
    def group(self) -> Hashable:
        """Tiles of equal group may share a tick: they need the same graph and have equal per-run inputs."""
        single = (i.name for i in self.graph.inputs if not i.per_tile)
        return self.role, *(self._scalars[name] for name in single)

    @property
    def remaining(self) -> int:
        """The number of tiles of this round that can still be taken."""
        return len(self.tiles) - self.taken

    def take(self, count: int) -> range:
        """Take the next `count` tiles and return their positions in `tiles`."""
        self.taken += count
        return range(self.taken - count, self.taken)

    def slot(self, tile: int) -> Slot:
        """Return the row of a tick's table for one tile."""
        needed = [spec.name for spec in self.graph.inputs]
        sources = {name: self._sources[name] for name in needed if name in self._sources}
        scalars = {name: self._scalars[name] for name in needed if name in self._scalars}
        return Slot(sources, scalars, self.target, *self.tiles[tile])

    def ran(self, count: int) -> None:
        """Record that `count` more tiles are blended; the last one ends the round."""
        self.cursor += count
        if self.cursor == len(self.tiles):
            self.taken = self.cursor = 0
            self._end_round()

    def _end_round(self) -> None:
        self.done = True


class Encoding(Pass):
    """The pass from the image to the latent that conditions the sampler, `target`."""

    stage = "encoding"

    def __init__(self, layout: TileLayout, device: Device, lr: Canvas, seed: int | None) -> None:
        """Make the pass; `lr` is the input at output size. Without a seed the noise is zero."""
        m, grid = layout.manifest, layout.coding
        shape = (m.latent_channels, *layout.latent)
        target = device.mean(shape, grid, layout.coding_window(1), wraps=layout.wraps)
        sources = {"image": lr}
        if any(spec.name == "noise" for spec in m.graphs[ENCODER].inputs):
            sources["noise"] = device.canvas(shape)
            if seed is not None:
                device.gaussian(sources["noise"], seed, noise.ENCODING_NOISE)
        super().__init__(m, grid, target, sources, {})

    @property
    def role(self) -> str:
        """The role of the encoder."""
        return ENCODER


class Sampling(Pass):
    """The passes from noise, or from the noised condition, to a clean latent, `z`."""

    stage = "sampling"

    def __init__(
        self,
        layout: TileLayout,
        device: Device,
        table: StepTable,
        cond: Canvas,
        settings: Settings,
        watch: Watch | None = None,
    ) -> None:
        """Make the pass; `cond` is the condition on the latent canvas."""
        m, gains = layout.manifest, prompt_gains(settings.guidance)
        self._shape = shape = (m.latent_channels, *layout.latent)
        grid = layout.sampling
        self.z = device.canvas(shape)
        target = device.mean(shape, grid, layout.window, wraps=layout.wraps)
        sources = {"z_t": self.z, "cond": cond}
        super().__init__(m, grid * len(gains), target, sources, {"t": float(table.t[0])})
        self._device, self._table, self._seed, self._step = device, table, settings.seed, 0
        self._layout, self._gains, self._watch = layout, gains, watch or Watch()
        self._targets = self._weighted(device, target)
        self._saved: SavedSteps | None = None
        self._last_saved = 0
        # features that later steps reuse belong to tiles, so the grid moves only at full steps
        self._moves = full_steps(table.expert, settings.reuse).cumsum() - 1
        self._history = device.canvas(shape) if table.extrapolation.any() else None
        self._roles = step_roles(m, table, settings.reuse)
        deep = m.deep if settings.reuse > 1 else None
        self._deep = [device.canvas(deep_size(deep), 0) for _ in self.tiles] if deep else []
        device.gaussian(self.z, settings.seed, noise.INITIAL_NOISE)
        if m.init == "latent" and not table.first:
            self._add(cond, float(m.schedule.alpha_bar[-1]))

    def start_from(self, latent: Canvas) -> None:
        """Begin with this latent of the LR image, with as much noise as the first step expects."""
        self._add(latent, float(self._table.alpha_bar[0]))

    def keep(self, saved: SavedSteps) -> list[str]:
        """Save steps from now on, and go on after those that were saved; returns the roles of these."""
        self._saved = saved
        state = saved.load(tuple(self._shape), len(self._table), history=self._history is not None)
        if state is None:
            return []
        self._device.fill(self.z, state.z)
        if self._history is not None and state.history is not None:
            self._device.fill(self._history, state.history)
        self._step = self._last_saved = state.steps
        self._scalars["t"] = float(self._table.t[self._step])
        self._move()
        return self._roles[: self._step]

    def _save(self) -> None:
        """Save the present step if it is due. Reused features are not saved, so it must be a full step."""
        if self._saved is None or self._step - self._last_saved < self._saved.every:
            return
        if self._moves[self._step] == self._moves[self._step - 1]:
            return
        history = self._device.download(self._history) if self._history is not None else None
        self._saved.save(State(self._step, self._device.download(self.z), history))
        self._last_saved = self._step

    def _add(self, latent: Canvas, signal: float) -> None:
        """Add a latent of that share of the power to the initial noise."""
        self._device.mix(self.z, latent, math.sqrt(1.0 - signal), math.sqrt(signal))

    @property
    def role(self) -> str:
        """The expert that serves the current step, or its shallow graph."""
        return self._roles[min(self._step, len(self._roles) - 1)]

    @property
    def upcoming(self) -> str | None:
        """The graph of the first later step that needs another graph than the current step."""
        later = self._roles[self._step :]
        return next((role for role in later if role != later[0]), None)

    def slot(self, tile: int) -> Slot:
        """Return the row for one tile and prompt; all tiles of a prompt come before those of the next."""
        prompt = list(self._targets)[tile * len(self._targets) // len(self.tiles)]
        self._scalars["prompt"] = float(prompt)
        if not self._deep:
            return replace(super().slot(tile), target=self._targets[prompt])
        self._sources[DEEP] = self._deep[tile]
        leaves = any(spec.name == DEEP for spec in self.graph.outputs)
        keeps = {DEEP: self._deep[tile]} if leaves else {}
        return replace(super().slot(tile), target=self._targets[prompt], keeps=keeps)

    def _weighted(self, device: Device, target: Mean) -> dict[int, Mean]:
        """The target by prompt, each with the window times the weight of that prompt."""
        window = self._layout.window
        return {
            prompt: target if gain == 1.0 else device.with_weights(target, window.dtype.type(gain) * window)
            for prompt, gain in self._gains.items()
        }

    def _move(self) -> None:
        """Move the grid to its place at the present step."""
        grid = self._layout.sampling_at(int(self._moves[self._step]))
        if grid == self.tiles[: len(grid)]:
            return
        self.tiles = grid * len(self._gains)
        self.target = self._device.with_origins(self.target, grid, self._layout.window)
        self._targets = self._weighted(self._device, self.target)

    def _end_round(self) -> None:
        """Move the canvas by one step of the sampler."""
        c = samplers.coefficients(self._table, self._step, self._manifest.prediction)
        position = self._table.first + self._step
        clean = self._show(c) if self._watch.wanted else None
        self._device.advance(self.z, self.target, c, self._seed, position, self._history)
        if clean is not None:
            latents, steps = np.array(self._device.download(self.z)), self._table.first + len(self._table)
            self._watch.pause(SamplingStep(position, steps, float(self._table.t[self._step]), latents, clean))
        self._step += 1
        self.done = self._step == len(self._table)
        if not self.done:
            self._scalars["t"] = float(self._table.t[self._step])
            self._move()
            self._save()

    def _show(self, c: samplers.Coefficients) -> np.ndarray | None:
        """Show the clean latent that the present step predicts; return it if the image pauses there."""
        z, out = self._device.download(self.z), self._device.download(self.target)
        self._watch.show(z, out, float(c.x_z), float(c.x_out))
        return c.x_z * z + c.x_out * out if self._watch.every_step else None

    def attend(self) -> list[str]:
        """Go on with the latents of a callback; after the last step, answer requests for a preview.

        Returns the graphs of the steps that are left out because the callback stopped the sampling.
        """
        if (latents := self._watch.take_latents()) is not None:
            self._device.fill(self.z, latents)
        if self.done and self._watch.asked:
            z = self._device.download(self.z)
            self._watch.show(z, z, 1.0, 0.0)
        if self.done or not self._watch.take_stop():
            return []
        left, self._step, self.done = self._roles[self._step :], len(self._roles), True
        return left


class Decoding(Pass):
    """The pass from a clean latent to pixels, `target`."""

    stage = "decoding"

    def __init__(
        self,
        layout: TileLayout,
        device: Device,
        z: Canvas,
        lr: Canvas | None = None,
        fidelity: float = 1.0,
        role: str = DECODER,
    ) -> None:
        """Make the pass; `z` is the latent canvas, `lr` the input at output size if the decoder takes it."""
        m, grid, factor = layout.manifest, layout.coding, layout.manifest.latent_factor
        window = layout.coding_window(factor)
        target = device.mean((3, *layout.frame.canvas), grid, window, factor, wraps=layout.wraps)
        sources = {"z": z} if lr is None else {"z": z, "lr": lr}
        self._role = role
        super().__init__(m, grid, target, sources, {"fidelity": fidelity})

    @property
    def role(self) -> str:
        """The role of the decoder."""
        return self._role


def step_roles(manifest: Manifest, table: StepTable, reuse: int) -> list[str]:
    """Return the graph of each step.

    One step in `reuse` is full; without shallow graphs `reuse` must be 1.
    """
    experts = [manifest.experts[k] for k in table.expert]
    full = full_steps(table.expert, reuse)
    return [e.graph if f else e.shallow or e.graph for e, f in zip(experts, full, strict=True)]


def prompt_gains(guidance: float) -> dict[int, float]:
    """Return the weights of the predictions by prompt, 0 to follow and 1 to avoid, without weights of 0.

    `out = out_1 + guidance * (out_0 - out_1)` (Ho and Salimans, 2021; StableSR, Eq. 8).
    """
    gains = {0: guidance, 1: 1.0 - guidance}
    return {prompt: gain for prompt, gain in gains.items() if gain}
