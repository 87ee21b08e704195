"""Clients that send images under one kind of load, and their measurements."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np

from load_test.server import Server


@dataclass(frozen=True)
class Kind:
    """A kind of load: `clients` send one image after the other.

    `in_turns` lets only one client send at a time, so that the service works on one image at a time while
    the others wait for their turn. `rate` is the number of images per second that all clients together send
    at random times (a Poisson process); None sends the next image as soon as the answer is there.
    """

    name: str
    clients: int
    part: float  # of the whole time
    in_turns: bool = False
    rate: float | None = None
    hostile: bool = False  # hostile clients send requests at the same time


@dataclass
class Load:
    """Measurements of one load."""

    kind: Kind
    seconds: float = 0.0
    latencies: list[tuple[int, float]] = field(default_factory=list)  # number of the input, seconds
    wrong: int = 0  # results that differ from serial ones, and other answers than 200 and 503
    refused: int = 0  # answers 503
    ticks: float = 0.0
    slots: float = 0.0

    @property
    def rate(self) -> float:
        """Return the number of images per second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    @property
    def slots_per_tick(self) -> float:
        """Return the mean number of tiles per run of a graph."""
        return self.slots / self.ticks if self.ticks else 0.0

    def quantile(self, percent: float, which: int | None = None) -> float:
        """Return a percentile of the latencies in seconds, of all inputs or of one; NaN if there are none."""
        times = [seconds for number, seconds in self.latencies if which in (None, number)]
        return float(np.percentile(times, percent)) if times else float("nan")


class Clients:
    """Runs loads against a server. `images` are the inputs, `want` their results when sent one by one."""

    def __init__(
        self, server: Server, images: Sequence[bytes], want: Sequence[np.ndarray | None], steps: int
    ) -> None:
        self._server, self._images, self._want, self._steps = server, images, want, steps
        self._lock = threading.Lock()

    def run(self, kind: Kind, seconds: float) -> Load:
        """Send images for this many seconds, then wait for the answers that are still due."""
        load, turn = Load(kind), threading.Lock()
        before, begin = self._server.metrics(), time.monotonic()
        threads = [
            threading.Thread(target=self._client, args=(number, load, turn, begin + seconds))
            for number in range(kind.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        load.seconds = time.monotonic() - begin
        after = self._server.metrics()
        load.ticks = after["moesr_ticks_total"] - before["moesr_ticks_total"]
        load.slots = after["moesr_slots_total"] - before["moesr_slots_total"]
        return load

    def _client(self, number: int, load: Load, turn: threading.Lock, end: float) -> None:
        """Send images until the end; the clients begin with different inputs."""
        kind, chance, sent = load.kind, random.Random(number), number
        while True:
            if kind.rate is not None:
                pause = chance.expovariate(kind.rate / kind.clients)
                time.sleep(min(pause, max(end - time.monotonic(), 0.0)))
            start, which = time.monotonic(), sent % len(self._images)
            if start >= end:
                return
            with turn if kind.in_turns else nullcontext():
                if time.monotonic() >= end:  # the client got its turn too late
                    return
                status, got = self._server.upscale(self._images[which], self._steps)
            self._note(load, which, status, got, time.monotonic() - start)
            sent += 1
            if status == 503:
                time.sleep(1.0)

    def _note(self, load: Load, which: int, status: int, got: np.ndarray | None, seconds: float) -> None:
        right = got is not None and np.array_equal(got, np.asarray(self._want[which]))
        with self._lock:
            if status == 503:
                load.refused += 1
                return
            load.wrong += not right
            if status == 200:
                load.latencies.append((which, seconds))
