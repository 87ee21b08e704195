"""Jobs on disk. A job's directory is complete before the client is told about it, so a kill loses no job.

STATE/lock           a file that is locked by the process that uses the directory
STATE/incoming/ID/   a request while it arrives, or a job that is being removed
STATE/jobs/ID/       an accepted job: `input`, `request.json`, and at the end `result.SUFFIX` or `error.json`

The jobs are read once, when the process starts; after that the disk is only written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from moesr.runtime.errors import OutputError
from moesr.runtime.serve.problems import Problem
from moesr.runtime.serve.result_format import FORMATS, SUFFIXES
from moesr.runtime.system.files import check_writable, write_atomically

INPUT, REQUEST, ERROR = "input", "request.json", "error.json"
KEPT = ("options", "width", "height", "accepted")  # attributes of a job in `request.json`
_ID = re.compile(r"[0-9a-f]{32}")

log = logging.getLogger("moesr")


@dataclass(eq=False)
class Job:
    """An accepted job: its options, the size of its input in pixels, and how it ended."""

    id: str
    directory: Path
    options: dict[str, Any]
    width: int
    height: int
    accepted: float = field(default_factory=time.time)  # seconds since the epoch
    ended: float | None = None  # time when it was done or failed, in seconds since the epoch
    error: dict[str, Any] | None = None  # the problem with which it ended

    @property
    def input(self) -> Path:
        """The image as it was sent; it is removed when the job has ended."""
        return self.directory / INPUT

    @property
    def result(self) -> Path:
        """The result, which exists once the job is done."""
        return self.directory / f"result{SUFFIXES[self.options['format']]}"

    @property
    def media_type(self) -> str:
        """The media type of the result."""
        return FORMATS[self.options["format"]]


class Store:
    """The directory that holds all jobs. Only one process at a time uses it."""

    def __init__(self, state: Path) -> None:
        """Create the directory and read its jobs; OutputError if it cannot be written or is in use."""
        self.state = state
        check_writable(state)
        try:
            for name in ("incoming", "jobs"):
                (state / name).mkdir(parents=True, exist_ok=True)
            self._lock = _locked(state / "lock")
            for left in (state / "incoming").iterdir():  # requests and jobs that a killed server left behind
                _remove(left)
            found = [_read(path) for path in (state / "jobs").iterdir()]
        except BlockingIOError:
            raise OutputError(
                f"{state}: is used by another moesr-serve; stop that one or choose another --state"
            ) from None
        except OSError as error:
            raise OutputError(
                f"{state}: cannot hold jobs ({error.strerror}); choose another --state"
            ) from error
        jobs = sorted((job for job in found if job), key=lambda job: job.accepted)
        self._jobs = {job.id: job for job in jobs}

    def close(self) -> None:
        """Unlock the directory."""
        self._lock.close()

    @property
    def jobs(self) -> Mapping[str, Job]:
        """All jobs by identifier, the oldest first."""
        return self._jobs

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
        values = {key: getattr(job, key) for key in KEPT}
        (directory / REQUEST).write_text(json.dumps(values), encoding="utf-8")
        for path in (directory / INPUT, directory / REQUEST, directory):
            _sync(path)
        directory.rename(job.directory)
        _sync(job.directory.parent)
        self._jobs[job.id] = job
        return job

    def finish(self, job: Job) -> None:
        """Record that a job's result is on disk, and remove its input."""
        job.ended = time.time()
        with contextlib.suppress(OSError):
            job.input.unlink()

    def fail(self, job: Job, problem: Problem) -> None:
        """Record the problem with which a job ended."""
        job.error, job.ended = problem.body(), time.time()
        try:
            with write_atomically(job.directory / ERROR) as stream:
                stream.write(json.dumps(job.error).encode())
        except (OSError, OutputError) as error:
            log.error(
                "job %s: its error cannot be stored, so it is tried again at the next start: %s",
                job.id,
                error,
            )
            return
        with contextlib.suppress(OSError):
            job.input.unlink()

    def remove(self, job: Job) -> None:
        """Remove a job with its input and result. If the process is killed, either all or nothing is left."""
        self._jobs.pop(job.id, None)
        removed = self.state / "incoming" / secrets.token_hex(16)
        with contextlib.suppress(OSError):  # it was removed before
            job.directory.rename(removed)
        _remove(removed)

    def expire(self, keep_s: float) -> int:
        """Remove jobs that ended more than `keep_s` seconds ago; return their number."""
        before = time.time() - keep_s
        old = [job for job in list(self._jobs.values()) if job.ended is not None and job.ended < before]
        for job in old:
            self.remove(job)
        return len(old)


def _read(directory: Path) -> Job | None:
    """Return the job in a directory; log a warning and return None if it is incomplete."""
    try:
        if not _ID.fullmatch(directory.name):
            raise ValueError("not the name of a job")
        values = json.loads((directory / REQUEST).read_text("utf-8"))
        job = Job(directory.name, directory, **{key: values[key] for key in KEPT})
        if job.result.exists():
            job.ended = job.result.stat().st_mtime
        elif (directory / ERROR).exists():
            job.ended = (directory / ERROR).stat().st_mtime
            job.error = json.loads((directory / ERROR).read_text("utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s: is not a complete job and is ignored (%s)", directory, error)
        return None
    return job


def _locked(path: Path) -> IO[str]:
    """Open and lock a file; BlockingIOError if another process has locked it."""
    stream = path.open("a")
    try:
        if sys.platform == "win32":
            import msvcrt

            try:
                msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError as error:
                raise BlockingIOError from error
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise
    return stream


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
