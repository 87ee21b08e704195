"""The handle of a submitted image: a future that can be canceled at any time and reports its progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

Result = TypeVar("Result")


@dataclass(frozen=True)
class JobProgress:
    """The progress of one image.

    `stage` is "waiting" (for memory), "preparing", "encoding", "sampling", "decoding" or "finishing", and at
    the end "done", "failed" or "cancelled". `fraction`, 0 to 1, is the share of the estimated work that is
    done. `seconds_left` is an estimate that takes the other images in flight into account. `position` is 1
    for the image that gets memory next, 2 for the one after it, and so on; 0 once it has memory. `seconds` is
    the time that the image has spent in each stage so far, in the order of the stages; "running" is the wait
    of a prepared image for its first tick.
    """

    fraction: float
    stage: str
    seconds_left: float
    position: int
    seconds: Mapping[str, float] = field(default_factory=dict)


class Handle(Future[Result]):
    """An image in work, as returned by `Upscaler.submit`.

    It is a `concurrent.futures.Future`: `result(timeout)`, `exception(timeout)`, `done()`, `cancelled()`,
    `add_done_callback(function)`, `concurrent.futures.wait` and `as_completed` work as documented there, and
    `asyncio.wrap_future(handle)` makes it awaitable. To cancel the asyncio future, as a timeout of
    `asyncio.wait_for` does, cancels the image.

    Unlike other futures a handle can be canceled while it is running. If it is dropped, the image is not
    canceled. Callbacks are called from one of the runtime's threads and should return quickly.
    """

    def __init__(
        self, progress: Callable[[], JobProgress], preview: Callable[[], np.ndarray | None] = lambda: None
    ) -> None:
        super().__init__()
        self._progress, self._preview = progress, preview
        self._cancelling = threading.Lock()
        self.owner: object = None  # keeps the Upscaler alive while the image is in flight

    def cancel(self) -> bool:
        """Cancel the image, whether it waits or runs; False if it already has a result or an error.

        `result` raises CancelledError at once. The machine stops working on the image at the next tick, which
        is one run of one graph, and then the image's memory is free again.
        """
        if not super().cancel():  # a future that runs elsewhere stays in the state "pending"
            return False
        if self._cancelling.acquire(blocking=False):  # called once; it informs `concurrent.futures.wait`
            self.set_running_or_notify_cancel()
        return True

    def running(self) -> bool:
        """Return True if the image has memory and is not done."""
        return not self.done() and self.progress.stage != "waiting"

    def fail_in_child(self, error: BaseException) -> None:
        """Fail in a forked child, which does not process the image; the old lock may be held for ever."""
        self._condition = threading.Condition()
        if not self.done():
            self.set_exception(error)

    @property
    def progress(self) -> JobProgress:
        """The current progress, which any thread may read at any time."""
        return self._progress()

    def preview(self) -> np.ndarray | None:
        """Draw the image as far as it has been sampled, in small: uint8 [h, w, 3], or None.

        One pixel stands for a latent pixel; the longest side has at most 512. The worker keeps what a preview
        needs only if one was asked for: the first call returns None, and there is a preview once the step
        that runs now has ended. Every call asks for the next one. There is none before the first step or
        after the end, and for an image in a GPU's memory only if the engine has a map to colors. Any thread
        may call this; it waits for nothing.
        """
        return self._preview()
