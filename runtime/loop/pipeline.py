"""The way of images from `submit` to their results: wait for memory, prepare, run in the worker, finish.

Images wait for memory in the order in which they came, apart from priorities; none overtakes another because
it is smaller, so none waits for ever. A few threads prepare images and finish them (resizing, color
correction) while the worker's thread runs graphs. No thread of a caller ever computes anything.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from typing import Any

from moesr.runtime.errors import UsageError
from moesr.runtime.loop import forking
from moesr.runtime.loop.admission import Admission
from moesr.runtime.loop.cost_model import Costs
from moesr.runtime.loop.handle import Handle, JobProgress
from moesr.runtime.loop.pictures import Source
from moesr.runtime.loop.residency import THREAD_PREFIX
from moesr.runtime.loop.sampling_watch import Watch
from moesr.runtime.loop.saved_steps import SavedLatents
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.ticket import Ticket
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.loop.work import Flow
from moesr.runtime.loop.worker import CLOSED, Worker, own_thread

THREADS = 2
"""The number of threads that prepare and finish images: one of them can be busy with a large image."""

OVERTAKES = {"low": -16.5, "normal": 0.0, "high": 16.5}
"""The number of images of normal priority that an image of this priority passes while it waits for memory.

If it is negative, they pass it.
"""

FORKED = (
    "this Upscaler was used before the process was forked, and its threads do not exist in the child; "
    "open an Upscaler in each process, or start processes by the method 'spawn'"
)

_LONGEST_NAP_S = 0.5  # other programs may free memory without notice

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class Statistics:
    """The work of an Upscaler, for monitoring.

    `waiting` images have no memory yet; `active` ones have it. `ticks` and `tiles` (slots filled) count what
    ran since the engine was opened, with at most `max_batch` tiles per tick. `seconds_left` estimates the
    time until all images in flight are done. `loaded` are the roles of the graphs in memory.
    """

    waiting: int
    active: int
    ticks: int
    tiles: int
    max_batch: int
    seconds_left: float
    loaded: tuple[str, ...]


class Pipeline:
    """The images in flight of one Upscaler. All methods may be called from any thread."""

    def __init__(
        self, worker: Worker, admission: Admission, costs: Costs, saved: SavedLatents | None = None
    ) -> None:
        """`saved` keeps the latents of unfinished images; without it none are saved."""
        self._saved = saved
        self._worker, self._admission, self._costs = worker, admission, costs
        self._lock, self._ticked, self._ended = worker.lock, worker.ticked, worker.ended
        self._waiting: list[Ticket] = []  # in the order in which they get memory
        self._active: list[Ticket] = []  # those with memory, the oldest first
        self._handles: dict[Ticket, Handle[Any]] = {}
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []
        self._refusal: str | None = None  # the reason why no further image is accepted
        forking.call_in_child(self, "_in_child")

    @property
    def refusal(self) -> str | None:
        """The error why no further image is accepted; None while images are accepted."""
        return self._refusal

    def submit(
        self,
        source: Source,
        layout: TileLayout,
        settings: Settings,
        flow: Flow,
        owner: object = None,
        *,
        every_step: bool = False,
    ) -> tuple[Ticket, Handle[Any]]:
        """Accept an image and return at once; UsageError if the pipeline is closed.

        `owner` is kept alive until the image has ended. With `every_step` the image pauses after each step
        until `resume` is called.
        """
        rank = next(self._numbers) - OVERTAKES[flow.priority]
        ticket = Ticket(source, layout, settings, flow, rank, Watch(every_step=every_step))
        handle: Handle[Any] = Handle(partial(self.progress, ticket), ticket.watch.ask)
        handle.owner = owner
        handle.add_done_callback(partial(self._hear, ticket))  # the first callback, before those of callers
        with self._lock:
            if self._refusal:
                raise UsageError(self._refusal)
            bisect.insort(self._waiting, ticket, key=lambda t: t.rank)
            self._handles[ticket] = handle
            self._start_thread()
            self._ended.notify_all()
        return ticket, handle

    def _start_thread(self) -> None:
        """Start one more thread if there is work for it."""
        if len(self._threads) < min(THREADS, len(self._handles)):
            name = f"{THREAD_PREFIX}images-{len(self._threads)}"
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no memory for the thread's stack: fewer threads do the same work
                if not self._threads:
                    raise
                return
            self._threads.append(thread)

    def wait(self, ticket: Ticket, report: Callable[[], None], enough: Callable[[], bool]) -> None:
        """Wait until `ticket` ended or `enough` holds, calling `report` whenever there was progress."""
        seen = -1
        while True:
            with self._ticked:
                while not (finished := ticket.ended or enough()) and ticket.ran.total() == seen:
                    self._ticked.wait()
                seen = ticket.ran.total()
            report()
            if finished:
                return

    def resume(self, ticket: Ticket) -> None:
        """Let an image go on that has paused after a step."""
        with self._lock:
            ticket.watch.release()
            self._worker.wake()

    @property
    def statistics(self) -> Statistics:
        """Return the current work; see `Statistics`."""
        with self._lock:
            tickets, worker = [*self._waiting, *self._active], self._worker
            left = sum((ticket.planned - ticket.ran for ticket in tickets), Counter[str]())
            counts = len(self._waiting), len(self._active), worker.ticks, worker.tiles, worker.max_batch
            return Statistics(*counts, self._costs.seconds(left), tuple(sorted(worker.loaded)))

    def seconds(self, tiles: Counter[str]) -> float:
        """Return the estimated seconds of a number of tiles by role."""
        return self._costs.seconds(tiles)

    def progress(self, ticket: Ticket) -> JobProgress:
        """Return the progress of an image; see `JobProgress`."""
        with self._lock:
            per_tile = self._costs.per_tile()
            position = self._waiting.index(ticket) + 1 if ticket in self._waiting else 0
            ahead = [*self._active, *self._waiting[: max(position - 1, 0)]]
            whole, done = _seconds(ticket.planned, per_tile) or 1.0, _seconds(ticket.ran, per_tile)
            left = 0.0 if ticket.ended or ticket.cancelled else max(whole - done, 0.0)
            total = left
            for other in ahead:
                if other is not ticket:
                    theirs = max(_seconds(other.planned, per_tile) - _seconds(other.ran, per_tile), 0.0)
                    fair = left * other.flow.weight / ticket.flow.weight
                    older = other.flow is ticket.flow and other.rank < ticket.rank
                    total += theirs if older else 0.0 if other.flow is ticket.flow else min(theirs, fair)
            fraction = 1.0 if ticket.stage == "done" else done / whole
            ticket.fraction = max(ticket.fraction, min(fraction, 1.0))  # it never decreases
            left = total if left else 0.0
            return JobProgress(ticket.fraction, ticket.shown_stage, left, position, ticket.seconds)

    def close(self) -> None:
        """Fail all images in flight with UsageError and release all memory; waits as `Worker.close` does."""
        with self._lock:
            if self._refusal == FORKED:  # objects that the parent opened must not be touched
                return
            self._refusal = CLOSED
            tickets = [*self._waiting, *self._active]
            self._ended.notify_all()
        self._worker.close()
        for ticket in tickets:
            self._end(ticket, error=UsageError(CLOSED))
        if not own_thread():
            for thread in self._threads:
                thread.join()

    def _serve(self) -> None:
        """Prepare and finish images; this is the function of a thread."""
        while True:
            try:
                step = self._next_step()
                if step is None:
                    return
                step()
            except BaseException as error:  # a defect, or no memory at all: the other images continue
                log.error("internal error: %s: %s", type(error).__name__, error)

    def _next_step(self) -> Callable[[], None] | None:
        """Wait for something to do; None once the pipeline is closed."""
        with self._lock:
            while not self._refusal:
                if over := next((t for t in self._active if t.stage == "running" and _done(t)), None):
                    over.stage = "finishing"
                    return partial(self._finish, over)
                if not self._waiting:
                    self._ended.wait()
                    continue
                first = self._waiting[0]
                try:
                    first.room = self._admission.reserve(first.layout, first.settings, first.extra_bytes)
                except BaseException as error:
                    return partial(self._end, first, error=error)
                if first.ended:  # canceled by the garbage collector, in this very thread
                    continue
                if first.room:
                    self._waiting.remove(first)
                    self._active.append(first)
                    first.stage = "preparing"
                    return partial(self._prepare, first)
                self._ended.wait(_LONGEST_NAP_S)
        return None

    def _prepare(self, ticket: Ticket) -> None:
        """Make the job of an image that has memory, and pass it to the worker."""
        try:
            assert ticket.source and ticket.room
            job = ticket.source.prepare(ticket.layout, ticket.settings, ticket.room.spooled)
            job.keep_steps(self._saved)
            with self._lock:
                ticket.prepared = True
                if ticket.cancelled:
                    raise CancelledError
                job.flow, job.watch = ticket.flow, ticket.watch
                ticket.job, ticket.ran, ticket.stage = job, job.ran, "running"
                self._worker.submit(job)
                self._ticked.notify_all()
        except BaseException as error:
            job = None  # the error holds this frame
            self._end(ticket, error=error)

    def _finish(self, ticket: Ticket) -> None:
        """Make the result of an image whose job is done."""
        job, source = ticket.job, ticket.source
        try:
            if job is None or source is None:
                raise CancelledError
            if job.error:
                raise job.error
            self._admission.warm = True
            result = source.finish(job)
        except BaseException as error:
            job = source = None  # the error holds this frame
            self._end(ticket, error=error)
        else:
            job = source = None
            self._end(ticket, result=result)

    def _hear(self, ticket: Ticket, handle: Future[Any]) -> None:
        """End a canceled image as soon as nothing uses it; called when a handle is done."""
        if not handle.cancelled():
            return
        with self._lock:
            ticket.cancelled = True
            if ticket.job:
                self._worker.cancel(ticket.job)
            waits = ticket.stage == "waiting"
        if waits:
            self._end(ticket, error=CancelledError())

    def _end(self, ticket: Ticket, *, result: Any = None, error: BaseException | None = None) -> None:
        """Release the image's memory and inform its handle.

        Only the first call for an image has an effect.
        """
        with self._lock:
            if ticket.ended:
                return
            ticket.ended = ticket.prepared = True
            cancelled = isinstance(error, CancelledError)
            ticket.stage = "cancelled" if cancelled else "failed" if error else "done"
            for tickets in (self._waiting, self._active):
                if ticket in tickets:
                    tickets.remove(ticket)
            ticket.let_go()
            handle = self._handles.pop(ticket)
            handle.owner = None
            self._ticked.notify_all()
            self._ended.notify_all()
        try:
            if cancelled:
                handle.cancel()
            elif error:
                _forget_locals(error)
                handle.set_exception(error)
            else:
                handle.set_result(result)
        except InvalidStateError:  # it was canceled at this moment
            pass

    def _in_child(self) -> None:
        """Handle a fork in the child: an unused pipeline works on, and a used one is left alone."""
        forking.skip_exit_handlers()
        used = self._threads or not self._worker.survives_fork
        self._worker.renew_locks()
        self._lock, self._ticked, self._ended = self._worker.lock, self._worker.ticked, self._worker.ended
        if not used or self._refusal:
            return
        forking.keep_for_ever(self._worker)
        self._refusal, self._threads = FORKED, []
        for handle in self._handles.values():
            handle.fail_in_child(UsageError(FORKED))
        self._handles.clear()


def _done(ticket: Ticket) -> bool:
    return bool(ticket.job and ticket.job.done)


def _seconds(tiles: Counter[str], per_tile: dict[str, float]) -> float:
    return sum(count * per_tile[role] for role, count in tiles.items())


def _forget_locals(error: BaseException) -> None:
    """Drop the variables of the frames through which an error passed, as they hold images."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
