"""The state of one image between `submit` and its result."""

from __future__ import annotations

import time
from collections import Counter

from moesr.runtime.engine.graph_io import ENCODER
from moesr.runtime.loop.admission import Reservation
from moesr.runtime.loop.job import Job, planned_tiles
from moesr.runtime.loop.pictures import Source
from moesr.runtime.loop.sampling_watch import Watch
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.loop.work import Flow


class Ticket:
    """One image between `submit` and its result. The pipeline's lock guards it."""

    def __init__(
        self,
        source: Source,
        layout: TileLayout,
        settings: Settings,
        flow: Flow,
        rank: float,
        watch: Watch,
    ) -> None:
        self.source: Source | None = source
        self.layout, self.settings, self.flow, self.rank = layout, settings, flow, rank
        self.watch = watch
        self.planned = planned_tiles(layout, settings)
        self.ran: Counter[str] = Counter()
        self._begun: dict[str, float] = {}  # clock of time.monotonic at the beginning of each stage
        self.stage = "waiting"
        self._work_stage = "encoding" if ENCODER in self.planned else "sampling"
        self.room: Reservation | None = None
        self.job: Job | None = None
        self.prepared = False  # the pixels of the caller's image have been read
        self.cancelled = self.ended = False
        self.fraction = 0.0  # the largest fraction that was shown

    @property
    def stage(self) -> str:
        """The stage: a pass of the job counts as "running"."""
        return self._stage

    @stage.setter
    def stage(self, stage: str) -> None:
        self._stage = stage
        self._begun[stage] = time.monotonic()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds in each stage so far, in their order, with the passes of the job as stages of their own."""
        begun = sorted(
            {**self._begun, **(self.job.begun if self.job else {})}.items(), key=lambda one: one[1]
        )
        ends = [start for _, start in begun[1:]]
        if not self.ended:
            ends.append(time.monotonic())
        return {stage: end - start for (stage, start), end in zip(begun, ends, strict=False)}

    @property
    def work_stage(self) -> str:
        """The current pass, or the first or last one if the image is not in the worker."""
        return self.job.stage if self.job else self._work_stage

    def extra_bytes(self, layout: TileLayout) -> int:
        """See `Source.extra_bytes`."""
        return self.source.extra_bytes(layout, self.settings) if self.source else 0

    def let_go(self) -> None:
        """Drop the image and the job, and release their memory."""
        self._work_stage = self.work_stage
        self._begun.update(self.job.begun if self.job else {})
        self.source = self.job = None
        self.watch.forget()
        if self.room:
            self.room.release()

    @property
    def shown_stage(self) -> str:
        """The stage by name, as in `JobProgress`."""
        if self.cancelled:
            return "cancelled"
        return self.work_stage if self.stage == "running" else self.stage
