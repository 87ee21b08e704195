"""The thread that owns an engine's sessions and device and runs ticks for all jobs in flight.

Submitting and canceling only change a list, so they never wait for a graph that runs. The thread survives
every error: an error ends the jobs that it concerns, and the next jobs run as before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError
from typing import Any
from weakref import WeakSet

from moesr.runtime.devices.interface import Device, Session
from moesr.runtime.errors import UsageError
from moesr.runtime.loop.cost_model import Costs
from moesr.runtime.loop.float32_retry import CheckedSession, Float32Retry, Opener
from moesr.runtime.loop.residency import THREAD_PREFIX, Residency
from moesr.runtime.loop.scheduler import Scheduler, TileBatch
from moesr.runtime.loop.work import Work

CLOSED = "this Upscaler is closed; open another"

log = logging.getLogger("moesr")


class Worker:
    """Runs jobs. `submit`, `cancel` and `close` may be called from any thread.

    `lock` guards the list of jobs. `ticked` is notified after every tick, and `ended` when a job is done;
    both are conditions over that lock. `ticks` and `tiles` count what ran so far.
    """

    def __init__(
        self,
        device: Device,
        residency: Residency,
        costs: Costs,
        max_batch: int,
        release: Callable[[], None] = lambda: None,
        open_float32: Opener = lambda role: None,
    ) -> None:
        """Make a worker; `release` is called at the end, when sessions and device are closed.

        `open_float32` opens graphs for tiles that run again after NaN or infinity.
        """
        self._device, self._residency = device, residency
        self._retry = Float32Retry(device, open_float32)
        self._costs, self.max_batch, self._release = costs, max_batch, release
        self._scheduler = Scheduler(costs, residency.reload_s, max_batch)
        self._jobs: list[Work] = []  # the oldest first
        self.renew_locks()
        self._closed = False
        self._buffers: dict[Hashable, dict[str, Any]] = {}  # by boundary: graphs of equal boundary share them
        self._bound: WeakSet[Session] = WeakSet()
        self._running: Session | None = None
        self._thread: threading.Thread | None = None
        self.ticks = self.tiles = 0
        self._unmeasured: Counter[str] = Counter()  # tiles since the last wait for an asynchronous device
        self._since = 0.0

    @property
    def loaded(self) -> frozenset[str]:
        """Roles of the graphs in memory or being loaded."""
        return self._residency.loaded

    def renew_locks(self) -> None:
        """Make new locks; in a forked child the old ones may be held by threads that do not exist there."""
        self.lock = threading.RLock()
        self.ticked, self.ended = threading.Condition(self.lock), threading.Condition(self.lock)
        self._wanted = threading.Condition(self.lock)  # notified when there is work for the thread

    def limit_batch(self, most: int) -> None:
        """Run at most so many tiles at once from now on, which takes less memory."""
        with self.lock:
            self.max_batch = self._scheduler.max_batch = min(self.max_batch, most)

    @property
    def survives_fork(self) -> bool:
        """Return True if a forked child can use the worker: on a CPU, before its thread has started."""
        return self._thread is None and self._device.synchronous

    def submit(self, job: Work) -> None:
        """Put a job in flight; UsageError if the worker is closed."""
        with self.lock:
            if self._closed:
                raise UsageError(CLOSED)
            if self._thread is None:
                thread = threading.Thread(target=self._work, name=f"{THREAD_PREFIX}worker", daemon=True)
                thread.start()  # RuntimeError if there is no memory for its stack
                self._thread = thread
            self._jobs.append(job)
            self._wanted.notify()

    def cancel(self, job: Work) -> None:
        """End a job with CancelledError before the next tick; this has no effect if it is done."""
        job.cancelled = True
        if job.paused:
            self.wake()

    def wake(self) -> None:
        """Let the thread look at its jobs again: one that was paused may go on."""
        with self.lock:
            self._wanted.notify()

    def close(self) -> None:
        """End the current run, fail the jobs in flight with UsageError, and release all memory.

        It waits for the thread, unless it is called from one of the runtime's own threads, as the garbage
        collector may do.
        """
        with self.lock:
            first, self._closed = not self._closed, True
            if self._running:
                self._running.abort()
            self._wanted.notify()
        if self._thread is None:
            if first:
                self._shut(used=False)
        elif not own_thread():
            self._thread.join()

    def _work(self) -> None:
        """Run turns until the worker is closed; this is the thread's function."""
        try:
            while self._turn():
                pass
        finally:
            with self.lock:
                self._closed = True
                self._end(self._jobs, UsageError(CLOSED))
                self._jobs = []
                self._notify(ended=True)
            self._shut(used=True)

    def _turn(self) -> bool:
        """Wait for jobs and run one tick for them; False once the worker is closed."""
        with self.lock:
            while not (self._closed or any(not job.paused or job.cancelled for job in self._jobs)):
                self._wanted.wait()
            if self._closed:
                return False
            jobs = list(self._jobs)
        try:
            self._tick(jobs)
        except BaseException as error:  # a defect of the scheduler: no job can continue
            self._end(jobs, error)
        with self.lock:
            self._jobs = [job for job in self._jobs if not job.done]
            self._notify(ended=any(job.done for job in jobs))
        return True

    def _notify(self, *, ended: bool) -> None:
        self.ticked.notify_all()
        if ended:
            self.ended.notify_all()

    def _shut(self, *, used: bool) -> None:
        """Close sessions and device, even if one of them fails."""
        sessions = (self._retry.close, self._residency.close)
        steps = (*sessions, self._buffers.clear, self._device.close, self._release)
        for step in steps if used else steps[:-1]:
            try:
                step()
            except Exception as error:
                log.warning("closing an engine: %s", error)

    def _tick(self, jobs: list[Work]) -> None:
        """Run one batch. An error ends only the jobs that it concerns."""
        self._end([job for job in jobs if job.cancelled], CancelledError())
        free = [job for job in jobs if not (job.done or job.paused)]
        begun = [j for j in free if self._alone(j, lambda j=j: self._begin(j)) and not j.done]
        batches = self._scheduler.next_batches(begun)
        if not batches:
            return
        try:
            self._run(batches)
        except BaseException as error:  # closing aborts the run, which is not an error of the engine
            self._end([batch.job for batch in batches], UsageError(CLOSED) if self._closed else error)
            return
        for batch in batches:
            self._alone(batch.job, lambda batch=batch: self._accept(batch))

    def _begin(self, job: Work) -> None:
        """Begin a job, or let it go on; one without a decoder may have paused after its last tile."""
        job.begin(self._device)
        if job.finished:
            self._complete(job)

    def _run(self, batches: list[TileBatch]) -> None:
        """Gather, run the graph and blend."""
        first = batches[0].job
        role = first.current.role
        session = self._session(role, first.upcoming)
        slots = [batch.job.current.slot(tile) for batch in batches for tile in batch.tiles]
        buffers = self._buffers[session.boundary]
        start = time.perf_counter()
        if not self._unmeasured:
            self._since = start
        if self._device.synchronous:
            checked = CheckedSession(session, role, buffers, self._retry)
            self._device.tick(slots, checked, buffers)
            jobs = [batch.job for batch in batches for _ in batch.tiles]
            for job in {jobs[tile] for tile in checked.repaired}:
                job.ran_in_float32()
        else:
            self._device.tick(slots, session, buffers)
        self.ticks, self.tiles = self.ticks + 1, self.tiles + len(slots)
        if self._device.synchronous:
            self._costs.observe(role, len(slots), time.perf_counter() - start)
        else:
            self._unmeasured[role] += len(slots)

    def _accept(self, batch: TileBatch) -> None:
        """Tell a job that its tiles ran, and fetch its result after the last of them."""
        job = batch.job
        if self._device.synchronous:
            job.check_finite()
        job.accept(batch.count)
        if job.finished and not job.paused:
            self._complete(job)

    def _complete(self, job: Work) -> None:
        """Fetch the result of a job whose tiles have all run."""
        if not self._device.synchronous:
            job.check_finite()  # waits, so that the time of all ticks until now is known
            self._costs.observe_together(self._unmeasured, time.perf_counter() - self._since)
            self._unmeasured.clear()
        job.finish()

    def _session(self, role: str, upcoming: str | None) -> Session:
        """Return the session of a role, bound to buffers that it shares with graphs of the same boundary."""
        session = self._residency.get(role, upcoming)
        with self.lock:
            if self._closed:
                raise UsageError(CLOSED)
            self._running = session
        if session not in self._bound:
            boundary = session.boundary
            if boundary not in self._buffers:
                specs = (*boundary.inputs, *boundary.outputs)
                self._buffers[boundary] = {s.name: self._device.buffer(s, self.max_batch) for s in specs}
            session.bind(self._buffers[boundary], self.max_batch)
            self._bound.add(session)
        return session

    def _alone(self, job: Work, step: Callable[[], None]) -> bool:
        """Do a step for one job; False if it failed, which ends that job."""
        try:
            step()
        except BaseException as error:
            self._end([job], error)
            return False
        return True

    def _end(self, jobs: list[Work], error: BaseException) -> None:
        for job in jobs:
            if not job.done:
                job.fail(error)


def own_thread() -> bool:
    """Return True if the current thread is one of the runtime's own, of any Upscaler."""
    return threading.current_thread().name.startswith(THREAD_PREFIX)
