"""A worker of the pool: one Upscaler, which turns rows of inputs into report rows.

Every row goes through the same code as a file of a local run. Errors are values of the report rows, because
an exception would end the whole dataset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moesr.runtime.cli import batch
from moesr.runtime.cli.batch import RunOptions
from moesr.runtime.cli.outputs import skip_line
from moesr.runtime.cli.preclean import PreCleaner
from moesr.runtime.cli.report import Entry, Report
from moesr.runtime.cluster.engines import engine_on_this_node
from moesr.runtime.cluster.listing import Row
from moesr.runtime.cluster.places import Found, Place, place_of
from moesr.runtime.errors import EngineError, InputError, MoesrError, OutputError
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.system.files import scratch_directory, sha256_of, sweep
from moesr.runtime.upscaler import Upscaler

ATTEMPTS = 3
"""An input is begun at most this many times; if it ends its worker each time, it counts as failed."""

STARTS, STARTS_PER_CORE = 8, 3
"""Workers that may begin to open the engine on a node, and per core of it, with none that succeeds."""

SETTLED_S = 60.0
"""A source that was last changed this long before its result was written is not read for comparison."""

SCRATCH = Path(tempfile.gettempdir())
"""The directory for copies of inputs and for results in work, $TMPDIR of the node."""

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class Work:
    """The task of all workers of a run, as they receive it."""

    engine: str  # see `engines.name_for_nodes`
    upscaler: Mapping[str, Any]  # options of an Upscaler
    target: str
    options: Mapping[str, Any]  # of `Upscaler.map`
    how: RunOptions
    wanted: Provenance
    pre_clean: Path | None = None


class RowReport(Report):
    """Stores the line of one file, with the warnings of its own thread."""

    def __init__(self) -> None:
        super().__init__(None)
        self.line: dict[str, Any] = {}
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Store a warning of this thread."""
        if record.thread == self._thread:
            super().emit(record)

    def write(self, values: dict[str, Any]) -> None:
        """Store the line."""
        self.line = values


class Worker:
    """Called with a row by several threads at a time; returns {"line": JSON, "code": exit code, "note"}."""

    def __init__(self, work: Work, ledger: Any = None, upscaler: Upscaler | None = None) -> None:
        """Open the engine. If it cannot be used on this node, the first call raises the error.

        That ends the run. Ray would take an error that is raised here for the death of a worker, and start
        another one. The driver calls a worker of its own with an `upscaler` and no `ledger`.
        """
        logging.getLogger("moesr").addHandler(logging.NullHandler())
        sweep(SCRATCH, again=True)  # a killed worker leaves its copies behind
        self._work, self._how, self._ledger = work, work.how, ledger
        self._target = place_of(work.target)
        self._refusal: Exception | None = None
        try:
            if work.pre_clean:
                cleaner = PreCleaner(work.pre_clean, work.upscaler.get("threads"))
                self._how = dataclasses.replace(work.how, pre_clean=cleaner)
            self._upscaler = upscaler or self._open()
        except Exception as error:
            self._refusal = error
        self._at_work, self._alone = 0, False
        self._changed = threading.Condition()

    def _open(self) -> Upscaler:
        """Open the engine; EngineError if workers of this node die of it again and again."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        starts: Any = ray.get(self._ledger.starting.remote(node, secrets.token_hex(8)))
        if starts > STARTS + STARTS_PER_CORE * (os.cpu_count() or 1):
            raise EngineError(
                f"workers on {os.uname().nodename} end while they open the engine; give them more memory "
                "(--memory-per-worker), or see the logs of the cluster"
            )
        upscaler = Upscaler(engine_on_this_node(self._work.engine), **self._work.upscaler)
        self._ledger.opened.remote(node)
        return upscaler

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the report row of one input."""
        import ray

        if self._refusal:
            raise self._refusal
        given = Row(**row)
        name = place_of(given.source).name(given.key)
        if self._ledger is None:
            return self._row(given, name, 1)
        attempt: Any = ray.get(self._ledger.begin.remote(name, secrets.token_hex(8)))
        with self._turn(alone=attempt > 1):
            return self._row(given, name, attempt)

    @contextlib.contextmanager
    def _turn(self, *, alone: bool) -> Iterator[None]:
        """Process an input, `alone` if it may end its worker, so that no other input is blamed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not (alone and self._at_work))
            self._at_work, self._alone = self._at_work + 1, alone
        try:
            yield
        finally:
            with self._changed:
                self._at_work, self._alone = self._at_work - 1, False
                self._changed.notify_all()

    def _row(self, row: Row, name: str, attempt: int) -> dict[str, Any]:
        entry = Entry(name)
        try:
            if attempt > ATTEMPTS:
                raise InputError(
                    f"{name}: its worker died {ATTEMPTS} times during its work; see the logs of "
                    "the cluster, or give workers more memory (--memory-per-worker)"
                )
            if attempt > 1:
                entry.warnings.append(f"a worker died during this work; attempt {attempt}")
            source, found = place_of(row.source), self._target.find(row.target)
            if found and not self._how.force:
                note = self._check_existing(row, source, name, found)
                return self._existing(entry, row, note, attempt)
            line, code = self._upscale(row, source, name)
            line["warnings"] = entry.warnings + line["warnings"]
            line["seconds"] = entry.line("done", self._work.wanted)["seconds"]
            return {"line": json.dumps(line), "code": code, "note": ""}
        except Exception as error:  # an exception would end the whole run
            text, code = batch.account_of(error, name)
            if not isinstance(error, MoesrError | MemoryError | OSError):
                text, code = f"{name}: internal error, please report it: {type(error).__name__}: {error}", 1
            line = entry.line("failed", self._work.wanted, text)
            return {"line": json.dumps(line), "code": code, "note": ""}

    def _check_existing(self, row: Row, source: Place, name: str, found: Found) -> str:
        """Return the line that says that an input is done; OutputError if its result's name is taken."""
        target, file_name = self._target.name(row.target), PurePosixPath(row.key).name
        record, wanted = found.record, self._work.wanted
        if record is None:
            raise OutputError(
                f"{name}: {target} exists and is not a result; pass --force to overwrite it, or name another "
                "place with -o"
            )
        if (record.source, record.scale) != (file_name, wanted.scale):
            raise OutputError(
                f"{name}: {target} is the result of {record.source}; name another place with -o"
            )
        digest = record.digest
        if source.keeps_dates or row.seconds > found.seconds - SETTLED_S:
            with scratch_directory(SCRATCH) as folder:
                digest = sha256_of(source.fetch(row.key, folder)[0])
        ignored = frozenset({"seed"}) if self._how.any_seed else frozenset[str]()
        return skip_line(name, target, record, wanted.of(file_name, digest), ignored, named=not row.listed)

    def _existing(self, entry: Entry, row: Row, note: str, attempt: int) -> dict[str, Any]:
        """Return the row of an input that has a result.

        A result just written by a lost worker counts as done.
        """
        if attempt > 1 and ", made with " not in note:
            entry.result = self._target.name(row.target)
            return {"line": json.dumps(entry.line("done", self._work.wanted)), "code": 0, "note": ""}
        return {"line": json.dumps(entry.line("skipped", self._work.wanted)), "code": 0, "note": note}

    def _upscale(self, row: Row, source: Place, name: str) -> tuple[dict[str, Any], int]:
        """Make and deliver a result; return the values of its line and the exit code."""
        with scratch_directory(SCRATCH) as folder:
            inputs, results = folder / "in", folder / "out"
            inputs.mkdir()
            path, version = source.fetch(row.key, inputs)
            made = results / PurePosixPath(row.target).name
            report = RowReport()
            code = batch.run(self._upscaler, [path], str(made), self._work.options, self._how, report)
            line = report.line
            line["input"] = name
            line["error"] = line["error"] and line["error"].replace(str(path), name)
            line["warnings"] = [warning.replace(str(path), name) for warning in line["warnings"]]
            if line["status"] == "done":
                if source.version(row.key) != version:
                    raise InputError(f"{name}: was modified while it was read; run again when it is complete")
                self._target.deliver(made, row.target)
                line["result"] = self._target.name(row.target)
        return line, code
