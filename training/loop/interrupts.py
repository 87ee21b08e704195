"""Stopping on request: the step at hand is finished and saved first."""

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
        """End the program as that signal does, now that all is saved."""
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
    """Let the main process alone answer Ctrl-C, which a terminal sends to the loader's processes too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
