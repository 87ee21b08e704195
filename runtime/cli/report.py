"""The report of a run: one line of JSON for each file, with the warnings about that file."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesr.runtime.errors import OutputError
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.loop.residency import THREAD_PREFIX
from moesr.runtime.system import console
from moesr.runtime.system.files import reason

log = logging.getLogger("moesr")


@dataclass
class Entry:
    """One file of a run, from the time when work on it began."""

    input: str
    result: str | None = None
    warnings: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def line(self, status: str, record: Provenance, error: str | None = None) -> dict[str, Any]:
        """Return the values of the entry's line; `status` is "done", "skipped" or "failed"."""
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "status": status,
            "input": self.input,
            "result": self.result,
            "engine": record.engine,
            "settings": dict(record.settings),
            "seconds": round(time.perf_counter() - self.began, 3),
            "warnings": self.warnings,
            "error": error,
        }


class Report(logging.Handler):
    """Appends lines to the file of `--log`, and with `--progress json` writes them to stderr.

    It is a handler of the log, which collects the warnings that appear while `collecting` an entry.
    """

    def __init__(self, path: Path | None, as_events: bool = False) -> None:
        """Open the file; OutputError if it cannot be written to."""
        super().__init__(logging.WARNING)
        self._path, self._as_events = path, as_events
        self._entry: Entry | None = None
        if path:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8"):
                    pass
            except (OSError, ValueError) as error:
                raise OutputError(
                    f"{path}: cannot be written to: {reason(error)}; name another file with --log"
                ) from error

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning for the current entry; warnings of the runtime's own threads come with results."""
        if (record.threadName or "").startswith(THREAD_PREFIX):
            return
        if self._entry is not None and record.levelno == logging.WARNING:
            self._entry.warnings.append(record.getMessage())

    @contextlib.contextmanager
    def collecting(self, entry: Entry) -> Iterator[None]:
        """Collect warnings for an entry during a `with` block."""
        before, self._entry = self._entry, entry
        log.addHandler(self)
        try:
            yield
        finally:
            log.removeHandler(self)
            self._entry = before

    def write(self, values: dict[str, Any]) -> None:
        """Append a line; if the file cannot be written to any more, log a warning."""
        if self._as_events:
            console.event("file", **values)
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")
        except OSError as error:
            log.warning("%s: a line is lost: %s", self._path, reason(error))
