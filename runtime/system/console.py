"""The parts that all programs share on a terminal: a guard against tracebacks, a log and a bar.

This module imports nothing large, so that the guard already holds while the rest of a program is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from moesr.runtime.errors import MemoryLimitError, MoesrError, UsageError
from moesr.runtime.system.memory import ran_out_of_memory

if TYPE_CHECKING:
    from tqdm import tqdm

BY_SIGNAL = 128
"""The exit code of a program that a signal ended is this plus the signal's number, as in shells: 130, 143."""

LINE_S = 10.0
"""If stderr is not a terminal, a line of progress is written each time this many seconds have passed."""

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

log = logging.getLogger("moesr")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A help formatter that keeps the line breaks of a program's description."""


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
    interrupted: str | Callable[[], str] = "finished results are kept",
    out_of_memory: str = "close other programs, or use a smaller image",
    extra: str = "",
) -> int:
    """Parse `argv`, run a program's body and return its exit code.

    `parser` and `work` import the large modules themselves. Log messages go to stderr as "NAME: message", and
    every exception becomes such a line. The parsed options `quiet` and `debug` are honored if the program has
    them. The program continues if a standard stream is closed or full, but exits with 1 if part of its report
    was lost. `extra` names the optional dependencies of the program, as in moesr[EXTRA].
    """
    with _sturdy_streams() as out, _signals() as stop, logging_to_stderr(logging.INFO, name):
        debug = False
        try:
            arguments = parser()
            arguments.error = functools.partial(_refuse, arguments)
            args = arguments.parse_args(argv)
            debug = getattr(args, "debug", False)
            log.setLevel(logging.WARNING if getattr(args, "quiet", False) else logging.INFO)
            code = work(args)
        except SystemExit as leave:  # argparse has printed its message
            out.flush()
            raise SystemExit(leave.code or int(out.lost)) from None
        except BaseException as error:
            # An interrupted import or C extension may raise another exception than that of the signal.
            after = interrupted() if callable(interrupted) else interrupted
            code = _report(stop.cause or error, debug, after, out_of_memory, extra)
        out.flush()
        return code or int(out.lost)


@contextlib.contextmanager
def logging_to_stderr(level: int, name: str = "moesr") -> Iterator[None]:
    """Send the log to stderr as "NAME: message" lines above the bar, during a `with` block."""
    handler, before = _LineHandler(name), log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def say(text: str) -> None:
    """Write a line to stdout, above the bar, with control characters escaped as by `printable`."""
    _write(printable(text), sys.stdout)


def printable(text: str) -> str:
    """Return text with control characters and line breaks as escapes, such as "\\x1b" and "\\n".

    File names and names in engines can hold terminal commands, line breaks, and marks that reverse the
    direction of writing. Everything that this module prints goes through this function.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


_shown: list[tqdm] = []  # bars on the terminal


def bar(quiet: bool = False, **options: Any) -> tqdm:
    """Make a bar on stderr with the given options of tqdm; without a terminal, a line every ten seconds."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread redraws a bar that is not updated
    if sys.stderr.isatty():
        options |= {"mininterval": 0.1, "dynamic_ncols": True, "file": sys.stderr}
    else:
        options |= {"mininterval": LINE_S, "miniters": 0, "ascii": True, "file": _Lines(sys.stderr)}
        if layout := options.get("bar_format"):
            options["bar_format"] = layout.replace("|{bar}|", "")
    made = tqdm(disable=quiet, **options)
    _shown[:] = [made]
    return made


class _Lines:
    """A stream that turns the text with which tqdm redraws its bar into separate lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> int:
        for part in text.split("\r"):
            line = part.strip()
            if line and line != self._last:
                self._last = line
                print(line, file=self._stream, flush=True)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def use_json() -> None:
    """Write every line of the log on stderr as a JSON object from now on, in the form of `event`."""
    for handler in log.handlers:
        if isinstance(handler, _LineHandler):
            handler.as_json = True


def event(kind: str, **values: Any) -> None:
    """Write a JSON object to stderr, on one line: {"event": KIND, ...}."""
    _write(json.dumps({"event": kind, **values}), sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    shown = any(not bar.disable for bar in _shown)  # a bar that is closed is disabled
    if shown:
        type(_shown[0]).write(text, file=stream)
    else:
        print(text, file=stream)
    stream.flush()


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """End a program as argparse does, but with control characters in the user's arguments escaped."""
    argparse.ArgumentParser.error(parser, printable(message))


def _report(error: BaseException, debug: bool, interrupted: str, out_of_memory: str, extra: str) -> int:
    """Log one line about the exception that ended a program and return the exit code."""
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
    if ran_out_of_memory(error):
        log.error("out of memory; %s", out_of_memory)
        return MemoryLimitError.exit_code
    if isinstance(error, OSError) and error.strerror:
        log.error("%s", f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        return 1
    if extra and isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("moesr"):
        log.error("%s is not installed; install it with: pip install 'moesr[%s]'", error.name, extra)
        return UsageError.exit_code
    hint = "" if debug else " (--debug shows the traceback)"
    log.error("internal error, please report it: %s: %s%s", type(error).__name__, error, hint)
    return 1


class _LineHandler(logging.Handler):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._program = name
        self.as_json = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.as_json:
            event("message", level=record.levelname.lower(), text=record.getMessage())
            return
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        line = printable(f"{self._program}: {prefix}{record.getMessage()}")
        try:
            _write(line, sys.stderr)
        except MemoryError:
            os.write(2, line.encode("utf-8", "backslashreplace") + b"\n")


class _Stream:
    """A standard stream whose writes never fail: once it is closed or full, it drops text and sets `lost`."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or io.StringIO()
        self._closed = stream is None
        self.lost = False

    def write(self, text: str) -> int:
        if not self._closed and not self.lost:
            encoding = self._stream.encoding or "utf-8"  # which may lack characters of file names
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
                # Drop the buffered text: the interpreter would fail to flush it at its end.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _sturdy_streams() -> Iterator[_Stream]:
    """Replace the standard streams by streams that never fail, during a `with` block, and yield stdout."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # otherwise the next file opened would get this number and the output
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
    """Holds the signal that asked the program to end."""

    cause: Stopped | None = None


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into an exception; a second ends the process at once."""
    stop, owner = _Stop(), os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != owner:  # this process is a forked worker
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
