"""What the programs of this project share on a terminal: one guard, one log, one bar.

Importing it is quick, so that a program is under its guard before anything large is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, cast

from moesr.runtime.errors import MemoryLimitError, MoesrError, UsageError

if TYPE_CHECKING:
    from tqdm import tqdm

BY_SIGNAL = 128
"""A program that a signal ended exits with this and the signal's number, as shells have it: 130, 143."""

log = logging.getLogger("moesr")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by SIGINT, SIGTERM and SIGHUP."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def run_program(
    name: str,
    parser: Callable[[], argparse.ArgumentParser],
    work: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "finished results are kept",
    out_of_memory: str = "close other programs, or use a smaller image",
    extra: str = "",
) -> int:
    """Parse `argv` and run a program's body; returns the exit code.

    `parser` and `work` import what is large. Log messages go to stderr as "NAME: message"; whatever is raised
    becomes one of them. The parsed `quiet` and `debug`, where the program has them, are heeded. Standard
    streams that are closed or full stop nothing: a report that could not be written makes the code 1. `extra`
    names what installs the packages that the program needs: moesr[EXTRA].
    """
    with _sturdy_streams() as out, _signals() as stop, logging_to_stderr(logging.INFO, name):
        debug = False
        try:
            args = parser().parse_args(argv)
            debug = getattr(args, "debug", False)
            log.setLevel(logging.WARNING if getattr(args, "quiet", False) else logging.INFO)
            code = work(args)
        except SystemExit as leave:  # argparse has said all
            out.flush()
            raise SystemExit(leave.code or int(out.lost)) from None
        except BaseException as error:
            # An interrupted import or C extension may raise something else in a signal's place.
            code = _report(stop.cause or error, debug, interrupted, out_of_memory, extra)
        out.flush()
        return code or int(out.lost)


@contextlib.contextmanager
def logging_to_stderr(level: int, name: str = "moesr") -> Iterator[None]:
    """Send the log to stderr as "NAME: message" lines, above the bar, for the time of a `with` block."""
    handler, before = _LineHandler(name), log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def say(text: str) -> None:
    """Write a line to stdout, above the bar."""
    _write(text, sys.stdout)


def bar(quiet: bool = False, **options: Any) -> tqdm:
    """A bar on stderr, for the options of tqdm; where that is a file, a line every ten seconds."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(disable=quiet, mininterval=interval, dynamic_ncols=True, file=sys.stderr, **options)


def _write(text: str, stream: TextIO) -> None:
    loaded = sys.modules.get("tqdm")  # without it there is no bar to write above
    if loaded:
        loaded.tqdm.write(text, file=stream)
    else:
        print(text, file=stream)
    stream.flush()


def _report(error: BaseException, debug: bool, interrupted: str, out_of_memory: str, extra: str) -> int:
    """Say on one line what ended a program; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        log.error("%s; %s", what, interrupted)
        return BY_SIGNAL + number
    if isinstance(error, MoesrError):
        log.error("%s", error)
        return error.exit_code
    if debug:
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.strerror:
        log.error("%s", f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        return 1
    # The libraries have no exception of their own for it.
    if isinstance(error, MemoryError) or "alloc" in str(error).lower():
        log.error("out of memory; %s", out_of_memory)
        return MemoryLimitError.exit_code
    if extra and isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("moesr"):
        log.error("%s is not installed; install it with: pip install 'moesr[%s]'", error.name, extra)
        return UsageError.exit_code
    hint = "" if debug else " (--debug shows where)"
    log.error("internal error, please report it: %s: %s%s", type(error).__name__, error, hint)
    return 1


class _LineHandler(logging.Handler):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._program = name

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        line = " ".join(record.getMessage().splitlines())
        _write(f"{self._program}: {prefix}{line}", sys.stderr)


class _Stream:
    """A standard stream that cannot fail: where it is closed or full it falls silent and remembers it."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or io.StringIO()
        self._closed = stream is None
        self.lost = False

    def write(self, text: str) -> int:
        if not self._closed and not self.lost:
            encoding = self._stream.encoding or "utf-8"  # file names may hold what it cannot say
            self._try(lambda: self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        self.lost |= self._closed and bool(text)
        return len(text)

    def flush(self) -> None:
        if not self._closed and not self.lost:
            self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError):
            self.lost = True
            with contextlib.suppress(OSError, ValueError):
                # What is still buffered goes nowhere, or the interpreter would fail on it when it ends.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _sturdy_streams() -> Iterator[_Stream]:
    """Standard streams that cannot fail, for the time of a `with` block; yields stdout."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened, a result even, would take its place and its output
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = _Stream(sys.stdout), _Stream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


class _Stop:
    """Whether a signal has asked the program to end."""

    cause: Stopped | None = None


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Turn the first signal to end into an exception that cleans up; a second ends the process at once."""
    stop, owner = _Stop(), os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != owner:  # a forked worker
            os.kill(os.getpid(), number)
            return
        stop.cause = Stopped(number)
        raise stop.cause

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
        before = {number: old for number, old in before.items() if old not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
