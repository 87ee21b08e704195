"""Jobs on disk. A job's directory is complete before the client is told about it, so a kill loses no job.

STATE/incoming/ID/   a request while it arrives
STATE/jobs/ID/       an accepted job: `input`, `request.json`, and at the end `result.SUFFIX` or `error.json`
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesr.runtime.errors import OutputError
from moesr.runtime.serve.problems import Problem
from moesr.runtime.serve.upload import FORMATS, SUFFIXES
from moesr.runtime.system.files import check_writable, write_atomically

INPUT, REQUEST, ERROR = "input", "request.json", "error.json"
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Job:
    """An accepted job: its options, and the size of its input in pixels."""

    id: str
    directory: Path
    options: dict[str, Any]
    width: int
    height: int
    accepted: float = field(default_factory=time.time)  # seconds since the epoch

    @property
    def input(self) -> Path:
        """The image as it was sent."""
        return self.directory / INPUT

    @property
    def result(self) -> Path:
        """The result, which exists once the job is done."""
        return self.directory / f"result{SUFFIXES[self.options['format']]}"

    @property
    def media_type(self) -> str:
        """The media type of the result."""
        return FORMATS[self.options["format"]]

    @property
    def error(self) -> dict[str, Any] | None:
        """The problem with which the job ended, or None."""
        try:
            return json.loads((self.directory / ERROR).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def ended(self) -> float | None:
        """The time when the job was done or failed, in seconds since the epoch; None before that."""
        for path in (self.result, self.directory / ERROR):
            try:
                return path.stat().st_mtime
            except OSError:
                continue
        return None

    def fail(self, problem: Problem) -> None:
        """Record the problem with which the job ended."""
        with write_atomically(self.directory / ERROR) as stream:
            stream.write(json.dumps(problem.body()).encode())


class Store:
    """The directory that holds all jobs."""

    def __init__(self, state: Path) -> None:
        """Create the directory; OutputError if it cannot be created or written."""
        self.state = state
        check_writable(state)
        try:
            for name in ("incoming", "jobs"):
                (state / name).mkdir(parents=True, exist_ok=True)
            for left in (state / "incoming").iterdir():  # requests that a killed server was receiving
                _remove(left)
        except OSError as error:
            raise OutputError(
                f"{state}: cannot hold jobs ({error.strerror}); choose another --state"
            ) from error

    def incoming(self) -> Path:
        """Create a directory for a request that arrives."""
        directory = self.state / "incoming" / secrets.token_hex(16)
        directory.mkdir()
        return directory

    def discard(self, directory: Path) -> None:
        """Remove the remaining files of a request."""
        _remove(directory)

    def accept(self, directory: Path, options: dict[str, Any], size: tuple[int, int]) -> Job:
        """Make a received request a job that survives a kill; return it once it is on disk."""
        job = Job(directory.name, self.state / "jobs" / directory.name, options, *size)
        values = {key: value for key, value in asdict(job).items() if key not in ("id", "directory")}
        (directory / REQUEST).write_text(json.dumps(values), encoding="utf-8")
        for path in (directory / INPUT, directory / REQUEST, directory):
            _sync(path)
        directory.rename(job.directory)
        _sync(job.directory.parent)
        return job

    def find(self, name: str) -> Job | None:
        """Return the job with that identifier, or None. No other text of a client reaches the file system."""
        if not _ID.fullmatch(name):
            return None
        directory = self.state / "jobs" / name
        try:
            return Job(name, directory, **json.loads((directory / REQUEST).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def jobs(self) -> Iterator[Job]:
        """Return all jobs, the oldest first."""
        found = (self.find(path.name) for path in (self.state / "jobs").iterdir())
        yield from sorted((job for job in found if job), key=lambda job: job.accepted)

    def remove(self, job: Job) -> None:
        """Remove a job with its input and result."""
        _remove(job.directory)

    def expire(self, keep_s: float) -> int:
        """Remove jobs that ended more than `keep_s` seconds ago; return their number."""
        old = [job for job in self.jobs() if job.ended is not None and time.time() - job.ended > keep_s]
        for job in old:
            self.remove(job)
        return len(old)


def _sync(path: Path) -> None:
    """Make the system write a file or directory to its disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # directories cannot be opened on Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
