"""Handling of Ctrl-C and SIGTERM: the current step is finished and saved before the program ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from moesr.runtime.system.console import Stopped


class StopRequest(threading.Event):
    """Set once a signal has asked to stop; `number` is that signal."""

    number: int = signal.SIGINT

    def stop(self) -> NoReturn:
        """End the program as the signal would have; call this once the state is saved."""
        raise Stopped(self.number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Yield an event that Ctrl-C and SIGTERM set; a second Ctrl-C interrupts at once."""
    event = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def request(number: int, frame: FrameType | None) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.number = number
        event.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C in a loader process: terminals send it to all processes, but the main one handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
