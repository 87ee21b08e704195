"""Work on one image in the worker: passes over tiles, and the state that scheduler and worker look at."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moesr.runtime.devices.interface import Device
from moesr.runtime.engine.graph_spec import Graph
from moesr.runtime.errors import NonFiniteError
from moesr.runtime.loop.passes import Pass
from moesr.runtime.loop.tile_layout import TileLayout

PRIORITIES = {"low": 0.25, "normal": 1.0, "high": 4.0}
"""Weights of flows by the name of their priority: a flow of weight 4 gets 4 times the seconds of weight 1."""

log = logging.getLogger("moesr")


@dataclass(eq=False)
class Flow:
    """Jobs that together get one fair share of the machine, such as all images of one `Upscaler.map`."""

    priority: str = "normal"
    credit: float = 0.0  # seconds; used by the scheduler

    @property
    def weight(self) -> float:
        """The weight of the flow's priority."""
        return PRIORITIES[self.priority]


class Work(ABC):
    """One image on its way through passes. Once it is `done`, it has an `error` or a result.

    `planned` and `ran` count tiles by graph, `planned` in the order of the passes. Any thread may make it;
    after that only the worker's thread changes it, until it is done.
    """

    def __init__(
        self, layout: TileLayout, planned: Counter[str], stage: str, flow: Flow | None = None
    ) -> None:
        """Make the work; `stage` is that of its first pass. All work of one `flow` has one share."""
        self.layout, self.planned, self.stage = layout, planned, stage
        self.flow = flow or Flow()
        self.ran: Counter[str] = Counter()
        self.begun: dict[str, float] = {}  # clock of time.monotonic at the beginning of each stage
        self.rounds = 0  # number of complete sampling steps and other passes
        self.finished = False  # all tiles have run
        self.cancelled = False  # set by any thread; the worker ends the job before its next tick
        self.done = False
        self.error: BaseException | None = None
        self.warnings: list[str] = []  # about this image, for its report
        self._passes: Iterator[Pass] | None = None
        self._entered: list[Pass] = []

    @property
    def current(self) -> Pass:
        """The pass that the job is in; `begin` must be called first."""
        return self._entered[-1]

    @property
    def paused(self) -> bool:
        """Whether the work waits for somebody, so that its tiles must not run."""
        return False

    @property
    def upcoming(self) -> str | None:
        """The graph that the job needs after the current one."""
        return self.current.upcoming

    def begin(self, device: Device) -> None:
        """Allocate the first pass, unless that has happened already."""
        if self._passes is None:
            self._device = device
            self.begun[self.stage] = time.monotonic()
            self._passes = self._go_through(device)
            self._entered.append(next(self._passes))

    def accept(self, count: int) -> None:
        """Record that `count` more tiles are blended, and enter the next pass if that ends this one."""
        current = self.current
        self.ran[current.role] += count
        current.ran(count)
        self.rounds += current.cursor == 0
        if current.done:
            self._enter_next()

    def _enter_next(self) -> None:
        """Begin the pass after the current one, or finish."""
        assert self._passes
        following = next(self._passes, None)
        if following:
            self._entered.append(following)
            self.stage = following.stage
            self.begun[self.stage] = time.monotonic()
        else:
            self.finished = True

    def ran_in_float32(self) -> None:
        """Record, once per graph, that tiles ran again in float32 after NaN or infinity."""
        graph = self.current.graph
        warning = (
            f"{graph.file}: NaN or infinite values in its output (precision {graph.precision}); the "
            + ("tiles at fault ran once more in float32")
        )
        if warning not in self.warnings:
            self.warnings.append(warning)
            log.warning("%s", warning)

    def check_finite(self) -> None:
        """Raise NonFiniteError if a graph gave NaN or infinity for this image. Waits for the device."""
        for entered in self._entered:
            if not self._device.finite(entered.target):
                raise NonFiniteError(_not_finite(entered.graph, again=self._device.synchronous))

    def finish(self) -> None:
        """Fetch the result and release the memory."""
        self._fetch()
        self._release()

    def fail(self, error: BaseException) -> None:
        """End the job with an error and release all of its memory."""
        self.error = error
        self._release()

    @abstractmethod
    def _go_through(self, device: Device) -> Iterator[Pass]:
        """Yield the passes in order; each begins when the previous one is done."""

    @abstractmethod
    def _fetch(self) -> None:
        """Fetch the result of the last pass from the device."""

    def _release(self) -> None:
        self._passes, self._entered = None, []
        self.done = True


def _not_finite(graph: Graph, *, again: bool) -> str:
    """The message for an image that failed; `again` says that its tiles also ran in float32."""
    cure = "the engine or its weights are damaged: export it again"
    if graph.precision != "fp32":
        cure = f"export the engine in float32 (moesr-export without --{graph.precision}) and use that"
        cure = f"a second run in float32 did not help; {cure}" if again else cure
    return f"{graph.file}: NaN or infinite values in its output (precision {graph.precision}); {cure}"
