"""The thread that owns an engine's sessions and device, and runs tick after tick for all jobs in flight.

Submitting and cancelling only change a list: they never wait for a graph that runs. Whoever waits for a job
sleeps until the worker says that something has changed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakSet

from moesr.runtime.devices.interface import Device, Session
from moesr.runtime.errors import UsageError
from moesr.runtime.loop.cost_model import Costs
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.residency import Residency
from moesr.runtime.loop.scheduler import TileBatch, next_batches

_LONGEST_NAP_S = 0.5  # what is waited for may change without the worker's doing
CLOSED = "this Upscaler is closed; open another"


class Worker:
    """Runs jobs, the oldest first; `submit`, `wait` and `cancel` may be called from any thread."""

    def __init__(self, device: Device, residency: Residency, costs: Costs, max_batch: int) -> None:
        self._device, self._residency = device, residency
        self._costs, self._max_batch = costs, max_batch
        self._jobs: list[Job] = []  # the oldest first
        self._changed = threading.Condition()
        self._closed = False
        self._buffers: dict[Hashable, dict[str, Any]] = {}  # by boundary: experts share theirs
        self._bound: WeakSet[Session] = WeakSet()
        self._running: Session | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Put a job in flight; UsageError once the worker is closed."""
        with self._changed:
            if self._closed:
                raise UsageError(CLOSED)
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="moesr-worker", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Forget a job, whether or not it is in flight; a tile of it that runs is run to its end."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def wait(self, job: Job, progress: Callable[[], None]) -> None:
        """Sleep until `job` is done, calling `progress` as work goes on; raises what made the job fail."""
        seen, done = -1, False
        while not done:
            with self._changed:
                while not job.done and job.ran.total() == seen:
                    self._changed.wait()
                seen, done = job.ran.total(), job.done
            progress()
        if job.error:
            raise job.error

    def wait_until(self, predicate: Callable[[], bool]) -> None:
        """Sleep until `predicate` holds, asking it again whenever something has changed."""
        with self._changed:
            while not predicate():
                self._changed.wait(_LONGEST_NAP_S)

    def close(self) -> None:
        """End the run under way, fail the jobs in flight with UsageError, and give all memory back."""
        with self._changed:
            self._closed = True
            if self._running:
                self._running.abort()
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        self._residency.close()
        self._buffers.clear()
        self._device.close()

    def _work(self) -> None:
        """The thread: a tick for the jobs in flight, again and again."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    self._end(self._jobs, UsageError(CLOSED))
                    self._changed.notify_all()
                    return
                jobs = list(self._jobs)
            self._tick(jobs)
            with self._changed:
                self._jobs = [job for job in self._jobs if not job.done]
                self._changed.notify_all()

    def _tick(self, jobs: list[Job]) -> None:
        """Run one batch; whatever goes wrong is the error of the jobs that it concerns, and of no other."""
        begun = [job for job in jobs if self._alone(job, lambda job=job: job.begin(self._device))]
        if not begun:
            return
        shares = next_batches(begun, self._max_batch)
        try:
            self._run(shares)
        except BaseException as error:  # a run that closing ended is no fault of the engine
            self._end([share.job for share in shares], UsageError(CLOSED) if self._closed else error)
            return
        for share in shares:
            self._alone(share.job, lambda share=share: self._accept(share))

    def _run(self, shares: list[TileBatch]) -> None:
        """Gather, run the graph, blend."""
        first = shares[0].job
        role = first.current.role
        session = self._session(role, first.upcoming)
        slots = [share.job.current.slot(tile) for share in shares for tile in share.tiles]
        buffers = self._buffers[session.boundary]
        start = time.perf_counter()
        self._device.tick(slots, session, buffers)
        if self._device.synchronous:
            self._costs.observe(role, len(slots), time.perf_counter() - start)

    def _accept(self, share: TileBatch) -> None:
        """Let a job know of its tiles, and fetch its result with the last of them."""
        job = share.job
        if self._device.synchronous:
            job.check_finite()
        job.accept(share.count)
        if job.finished:
            if not self._device.synchronous:
                job.check_finite()
            job.finish()

    def _session(self, role: str, upcoming: str | None) -> Session:
        """The session of a role, bound to buffers that it shares with graphs of the same boundary."""
        session = self._residency.get(role, upcoming)
        with self._changed:
            if self._closed:
                raise UsageError(CLOSED)
            self._running = session
        if session not in self._bound:
            boundary = session.boundary
            if boundary not in self._buffers:
                specs = (*boundary.inputs, *boundary.outputs)
                self._buffers[boundary] = {s.name: self._device.buffer(s, self._max_batch) for s in specs}
            session.bind(self._buffers[boundary], self._max_batch)
            self._bound.add(session)
        return session

    def _alone(self, job: Job, step: Callable[[], None]) -> bool:
        """Take a step for one job; False where it failed, which ends that job."""
        try:
            step()
        except BaseException as error:
            self._end([job], error)
            return False
        return True

    def _end(self, jobs: list[Job], error: BaseException) -> None:
        for job in jobs:
            job.fail(error)
