"""One image on its way: its inputs, the passes that it goes through, and how far it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from moesr.runtime.devices.interface import Canvas, Device
from moesr.runtime.engine.graph_io import DECODER, ENCODER
from moesr.runtime.engine.graph_spec import Graph
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import NonFiniteError
from moesr.runtime.loop.passes import Decoding, Encoding, Pass, Sampling, prompt_gains, step_roles
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import coding_grid, sampling_grid
from moesr.runtime.sampling.samplers import ETA, MULTISTEP
from moesr.runtime.sampling.schedule import step_table


class Job:
    """One image on its way. Once it is `done`, there is an `error` or an `image`, the result.

    `planned` and `ran` count tiles by the graph they run through. Made by the caller; then the worker's
    thread alone changes it, until it is done.
    """

    def __init__(
        self, manifest: Manifest, lr: np.ndarray, condition: np.ndarray | None, settings: Settings
    ) -> None:
        """`lr` [H, W, 3] is the input at output size, `condition` [h, w, 3] that on the latent grid.

        Both at least a tile, uint8 or uint16; the condition is None where an encoder makes it. ValueError
        where the settings do not fit the schedule.
        """
        eta, multistep = ETA[settings.sampler], settings.sampler in MULTISTEP
        spaced = manifest.schedule, settings.steps, eta, manifest.expert_ranges
        self._table = step_table(*spaced, multistep=multistep)
        self._manifest, self.settings = manifest, settings
        self._condition, self.lr = condition, lr
        self._size = (lr.shape[0] // manifest.latent_factor, lr.shape[1] // manifest.latent_factor)
        self.planned = self._plan()
        self.ran: Counter[str] = Counter()
        self.stage = Encoding.stage if ENCODER in self.planned else Sampling.stage
        self.rounds = 0  # steps taken, and passes of one round
        self.finished = False  # every tile ran
        self.done = False
        self.error: BaseException | None = None
        self.image: np.ndarray | None = None  # float32 [3, H, W], about [-1, 1]
        self._passes: Iterator[Pass] | None = None
        self._entered: list[Pass] = []
        self._result: Canvas | None = None

    @property
    def current(self) -> Pass:
        """The pass that the job is in; `begin` comes first."""
        return self._entered[-1]

    @property
    def upcoming(self) -> str | None:
        """The graph that the job needs after the present one."""
        if self.current.upcoming or self.stage == Decoding.stage:
            return self.current.upcoming
        if self.stage == Encoding.stage:
            return list(self.planned)[1]
        return DECODER if DECODER in self.planned else None

    def begin(self, device: Device) -> None:
        """Take memory for the first pass, if that has not happened yet."""
        if self._passes is None:
            self._device = device
            self._passes = self._go_through(device)
            self._entered.append(next(self._passes))

    def accept(self, count: int) -> None:
        """Take note that the next `count` tiles are blended, and move on where that ends a pass."""
        current = self.current
        self.ran[current.role] += count
        current.ran(count)
        self.rounds += current.cursor == 0
        if not current.done:
            return
        assert self._passes
        following = next(self._passes, None)
        if following:
            self._entered.append(following)
            self.stage = following.stage
        else:
            self.finished = True

    def check_finite(self) -> None:
        """Raise NonFiniteError where a graph gave NaN or infinity for this image; waits for the device."""
        for entered in self._entered:
            if not self._device.finite(entered.target):
                raise NonFiniteError(_not_finite(entered.graph))

    def _plan(self) -> Counter[str]:
        """Tiles by graph, in the order of the passes."""
        m, plan = self._manifest, Counter[str]()
        coded = len(coding_grid(m, *self._size))
        sampled = len(sampling_grid(m, *self._size)) * len(prompt_gains(self.settings.guidance))
        if m.condition == "latent":
            plan[ENCODER] = coded
        for role in step_roles(m, self._table, self.settings.reuse):
            plan[role] += sampled
        if DECODER in m.graphs:
            plan[DECODER] = coded
        return plan

    def _go_through(self, device: Device) -> Iterator[Pass]:
        """The passes in order; each begins when the one before is done."""
        m, settings, size = self._manifest, self.settings, self._size
        lr = device.upload(self.lr, m.latent_factor)
        if m.condition == "latent":
            encoding = Encoding(m, device, lr, size, settings.seed)
            yield encoding
            cond: Canvas = encoding.target
        else:
            assert self._condition is not None
            cond = device.upload(self._condition)
        how = settings.seed, settings.guidance, settings.reuse
        sampling = Sampling(m, device, self._table, cond, size, *how)
        yield sampling
        result: Canvas = sampling.z
        if DECODER in m.graphs:
            decoding = Decoding(m, device, result, lr, size, settings.fidelity)
            yield decoding
            result = decoding.target
        self._result = result

    def finish(self) -> None:
        """Fetch the result and let go of the device's memory."""
        assert self._result
        self.image = self._device.download(self._result)
        self._let_go()

    def fail(self, error: BaseException) -> None:
        """End here, with an error."""
        self.error = error
        self._let_go()

    def _let_go(self) -> None:
        self._passes, self._entered, self._result = None, [], None
        self.done = True


def _not_finite(graph: Graph) -> str:
    cure = (
        "the engine or its weights are damaged: export it again"
        if graph.precision == "fp32"
        else f"export the engine in float32 (moesr-export without --{graph.precision}) and use that"
    )
    return f"{graph.file}: NaN or infinite values in its output (precision {graph.precision}); {cure}"
