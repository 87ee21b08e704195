"""Many images in order, with a few of them in flight at a time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moesr.runtime.errors import EngineError, MoesrError, NonFiniteError, UsageError
from moesr.runtime.loop.handle import Handle
from moesr.runtime.loop.pipeline import Pipeline
from moesr.runtime.loop.sampling_watch import OnStep
from moesr.runtime.loop.ticket import Ticket

Progress = Callable[[float, float, str], None]
"""A function of the work done and the total work, both in estimated seconds, and of the stage.

The stage is "encoding", "sampling" or "decoding". Estimates start from multiply-accumulates and follow the
measurements of this process, so the total may change during the work.
"""

InFlight = tuple[Ticket | None, Handle[Any]]
"""An image in flight; if it could not be used, it has no ticket, and the handle has the error."""


class ImageStream:
    """Submits the images of an iterable one after the other and yields their results in order.

    The next image is fetched when the pixels of the previous one have been read, so the iterable may fill the
    same array again and again.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        submit: Callable[[Any], InFlight],
        most: int,
        return_errors: bool = False,
        progress: Progress | None = None,
        begun: Callable[[Any], None] | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        """Start with at most `most` images in flight. The other arguments are those of `Upscaler.map`."""
        self._pipeline, self._submit, self._most = pipeline, submit, most
        self._return_errors, self._progress, self._begun = return_errors, progress, begun
        self._on_step = on_step
        self._flight: deque[InFlight] = deque()
        self._yielded = 0
        self._finished: Counter[str] = Counter()  # tiles of images that have been yielded
        self._exhausted = False

    def results(self, images: Iterable[Any]) -> Iterator[Any]:
        """Yield the results; closing the iterator cancels the images in flight."""
        coming = iter(images)
        try:
            while True:
                while self._may_fetch():
                    self._fetch(coming)
                if not self._flight:
                    return
                ticket, handle = self._flight[0]
                if ticket:
                    self._pipeline.wait(ticket, self._report, lambda: self._may_fetch() or self._paused())
                    self._show_steps()
                    if not ticket.ended:
                        continue
                error = handle.exception()
                if error and not (self._return_errors and _spares_others(error)):
                    raise error
                self._flight.popleft()
                self._finished += ticket.ran if ticket else Counter()
                self._yielded += 1
                yield error or handle.result()
        finally:
            for _, handle in self._flight:
                handle.cancel()

    def _may_fetch(self) -> bool:
        """Return True if there is another image, there is room for it, and the previous one has been read."""
        if self._exhausted or len(self._flight) >= self._most:
            return False
        return all(ticket is None or ticket.prepared for ticket, _ in self._flight)

    def _fetch(self, coming: Iterator[Any]) -> None:
        for image in coming:
            self._flight.append(self._submit(image))
            if self._begun and self._flight[-1][0]:
                self._begun(image)
            return
        self._exhausted = True

    def _paused(self) -> bool:
        """Return True if an image waits for `on_step`."""
        return any(ticket is not None and ticket.watch.step is not None for ticket, _ in self._flight)

    def _show_steps(self) -> None:
        """Call `on_step` for every image that waits for it; an exception cancels the images."""
        for image, (ticket, _) in enumerate(self._flight, self._yielded):
            step = ticket.watch.step if ticket else None
            if ticket and step and self._on_step:
                step.image = image
                self._on_step(step)
                self._pipeline.resume(ticket)

    def _report(self) -> None:
        tickets = [ticket for ticket, _ in self._flight if ticket]
        if self._progress and tickets:
            done = sum((ticket.ran for ticket in tickets), self._finished)
            total = sum((ticket.planned for ticket in tickets), self._finished)
            self._progress(self._pipeline.seconds(done), self._pipeline.seconds(total), tickets[0].work_stage)


def _spares_others(error: BaseException) -> bool:
    """Return True if other images can still be done after this error."""
    if isinstance(error, NonFiniteError):
        return True
    return isinstance(error, (MoesrError, MemoryError)) and not isinstance(error, (EngineError, UsageError))
