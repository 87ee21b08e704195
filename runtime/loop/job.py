"""One image to be super-resolved in the worker: its inputs and its passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from moesr.runtime.devices.host import HostDevice
from moesr.runtime.devices.interface import Canvas, Device
from moesr.runtime.engine.graph_io import DECODER, ENCODER
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.images.planes import to_unit
from moesr.runtime.loop.band_decoding import BandDecoding, RowSink
from moesr.runtime.loop.passes import Decoding, Encoding, Pass, Sampling, prompt_gains, step_roles
from moesr.runtime.loop.sampling_watch import Watch
from moesr.runtime.loop.saved_steps import SavedLatents, SavedSteps
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.loop.work import Flow, Work
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.runtime.sampling.schedule import StepTable

ROWS_AT_ONCE = 256
"""Rows that are fetched from a device together if the result goes to a sink."""


class OnDevice(Protocol):
    """Makes the inputs of a job from an image in the device's memory, and writes its result there."""

    def begin(self, device: Any, layout: TileLayout) -> tuple[Canvas, Canvas | None]:
        """Return the input at output size, and the condition unless an encoder makes it."""
        ...

    def end(self, device: Any, layout: TileLayout, lr: Canvas, result: Canvas, settings: Settings) -> None:
        """Write a result."""
        ...


class Job(Work):
    """An image to be super-resolved. Once it is done without error, `image` or the sink has the result."""

    def __init__(
        self,
        layout: TileLayout,
        lr: np.ndarray,
        condition: np.ndarray | None,
        settings: Settings,
        flow: Flow | None = None,
        sink: RowSink | None = None,
    ) -> None:
        """Make a job of `lr` [H, W, 3] at output size and `condition` [h, w, 3] on the latent grid.

        Both have the size of the layout's canvas and are uint8 or uint16. The condition is None if an encoder
        makes it. Jobs of one `flow` share one part of the machine; by default a job has a flow of its own.
        With a `sink` the result goes there, row by row, and not to `image`. ValueError if the settings do not
        fit the schedule.
        """
        self._table = step_table(layout.manifest, settings)
        planned = planned_tiles(layout, settings)
        super().__init__(layout, planned, Encoding.stage if ENCODER in planned else Sampling.stage, flow)
        self.settings = settings
        self._condition, self.lr, self._sink = condition, lr, sink
        self.image: np.ndarray | None = None  # float32 [3, H, W], about [-1, 1]
        self.saved: SavedSteps | None = None  # where steps are saved, if they are
        self.watch = Watch()
        self._sampling: Sampling | None = None
        self._result: Canvas | None = None
        self.on_device: OnDevice | None = None  # set for an image that is in the device's memory
        self._lr: Canvas | None = None

    @property
    def upcoming(self) -> str | None:
        """The graph that the job needs after the current one."""
        if self.current.upcoming or self.stage == Decoding.stage:
            return self.current.upcoming
        if self.stage == Encoding.stage:
            return list(self.planned)[1]
        return DECODER if DECODER in self.planned else None

    def keep_steps(self, latents: SavedLatents | None) -> None:
        """Save steps as the settings say; call it before the worker gets the job."""
        if latents and self.settings.checkpoint_every:
            self.saved = latents.of(self.settings, self.lr, self._condition)

    def begin(self, device: Device) -> None:
        """Allocate the first pass, unless that has happened already, and answer what the watch asks."""
        if self._sampling and (left := self._sampling.attend()):
            for role in left:
                self.ran[role] += len(self._sampling.tiles)
            self.rounds += len(left)
            self._enter_next()
        super().begin(device)

    @property
    def paused(self) -> bool:
        """Whether the image waits for a callback, so that its tiles must not run."""
        return self.watch.paused

    def _go_through(self, device: Device) -> Iterator[Pass]:
        """Yield the passes in order; each begins when the previous one is done."""
        layout, settings = self.layout, self.settings
        m = layout.manifest
        lr, condition = self._inputs(device)
        if m.condition == "latent":
            encoding = Encoding(layout, device, lr, settings.seed)
            yield encoding
            cond: Canvas = encoding.target
        else:
            assert condition
            cond = condition
        self.watch.look_at(layout, self.lr)
        self._sampling = sampling = Sampling(layout, device, self._table, cond, settings, self.watch)
        if settings.start_step:
            latent = cond
            if m.condition == "image":  # without an encoder the enlarged image stands for its latent
                assert self._condition is not None
                latent = device.canvas((3, *layout.latent))
                planes = self._condition.transpose(2, 0, 1)
                device.fill(latent, to_unit(planes, np.empty(planes.shape, np.float32)))
            sampling.start_from(latent)
        if self.saved:
            for role in sampling.keep(self.saved):
                self.ran[role] += len(sampling.tiles)
                self.rounds += 1
        yield sampling
        result: Canvas = sampling.z
        if DECODER in m.graphs:
            if self._sink and isinstance(device, HostDevice):
                yield BandDecoding(layout, device, result, lr, settings.fidelity, self._sink)
                return
            decoding = Decoding(layout, device, result, lr, settings.fidelity)
            yield decoding
            result = decoding.target
        self._result = result

    def _inputs(self, device: Device) -> tuple[Canvas, Canvas | None]:
        """Return the input at output size, and the condition unless an encoder makes it."""
        if self.on_device:
            self._lr, condition = self.on_device.begin(device, self.layout)
            return self._lr, condition
        lr = device.upload(self.lr, self.layout.manifest.latent_factor)
        return lr, None if self._condition is None else device.upload(self._condition)

    def _fetch(self) -> None:
        """Fetch the result, unless the sink has it or it stays on the device."""
        if self.on_device:
            assert self._result and self._lr
            self.on_device.end(self._device, self.layout, self._lr, self._result, self.settings)
        elif self._result and self._sink:
            height = self.layout.frame.canvas[0]
            for start in range(0, height, ROWS_AT_ONCE):
                rows = slice(start, min(start + ROWS_AT_ONCE, height))
                self._sink.write(start, self._device.download(self._result, rows))
        elif self._result:
            self.image = self._device.download(self._result)

    def fail(self, error: BaseException) -> None:
        """End the job with an error and release all of its memory."""
        self._condition, self.lr = None, self.lr[:0].copy()
        super().fail(error)

    def _release(self) -> None:
        self._result, self._lr, self._sink, self._sampling = None, None, None, None
        super()._release()


def step_table(manifest: Manifest, settings: Settings) -> StepTable:
    """The steps of one run, from the start step on; ValueError as for `Job`."""
    sampler = SAMPLERS[settings.sampler]
    whole = sampler.table(manifest.schedule, settings.steps, manifest.expert_ranges)
    return whole.after(settings.start_step)


def planned_tiles(layout: TileLayout, settings: Settings) -> Counter[str]:
    """Return the number of tiles of an image by graph, in the order of the passes.

    ValueError as for `Job`.
    """
    m, plan = layout.manifest, Counter[str]()
    table = step_table(m, settings)
    sampled = len(layout.sampling) * len(prompt_gains(settings.guidance))
    if m.condition == "latent":
        plan[ENCODER] = len(layout.coding)
    for role in step_roles(m, table, settings.reuse):
        plan[role] += sampled
    if DECODER in m.graphs:
        plan[DECODER] = len(layout.coding)
    return plan
