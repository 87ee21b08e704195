"""Files and directories that are complete or absent, and plain reasons why a path cannot be used.

A file is written beside its final place as `.moesr-HOST-PID-RANDOM.tmp` and renamed when it is complete. A
process that is killed leaves the temporary file behind. The next process that writes in the same place
removes it, and restores a directory that was moved aside to be replaced.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from moesr.runtime.errors import InputError, MoesrError, OutputError

FOREIGN_AGE_S = 86_400
"""Temporary files of other machines or containers are removed at this age, as their process is unknown."""

_LEFTOVER = re.compile(r"\.moesr-(?:([0-9a-f]{8})-)?(\d+)-[0-9a-f]+\.tmp")
_NEW, _OLD = "new", "old"  # inside the temporary directory of `new_directory`

_PERMISSIONS = "check its permissions and those of the directories above it"
_CURES = {
    errno.ENAMETOOLONG: "shorten it",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ELOOP: "its links lead in a circle",
    errno.ENOSPC: "free some",
}


def reason(error: Exception) -> str:
    """Return the problem with a path in the words of the system, and a cure if one is known."""
    if isinstance(error, OSError) and error.strerror:
        cure = _CURES.get(error.errno or 0)
        return f"{error.strerror}; {cure}" if cure else error.strerror
    if isinstance(error, UnicodeError) or "null byte" in str(error) or "null char" in str(error):
        return f"not a possible file name ({error}); name another"
    return str(error) or type(error).__name__


def examine(path: Path, error: type[MoesrError] = InputError) -> os.stat_result | None:
    """Return the status of `path`, following links, or None if nothing is there.

    Raises `error` if the status cannot be read.
    """
    try:
        return os.stat(path)  # noqa: PTH116 - pathlib hides a NUL character
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be examined: {reason(problem)}") from problem


def kind_of(status: os.stat_result) -> str:
    """Return the kind of a path: "file", "directory", "pipe", "socket" or "device"."""
    mode = status.st_mode
    for test, name in ((stat.S_ISREG, "file"), (stat.S_ISDIR, "directory"), (stat.S_ISFIFO, "pipe")):
        if test(mode):
            return name
    return "socket" if stat.S_ISSOCK(mode) else "device"


def check_file(path: Path) -> os.stat_result:
    """Return the status of a regular file.

    InputError for anything else, as reading a pipe could wait forever.
    """
    status = examine(path)
    if status is None:
        if path.is_symlink():
            raise InputError(f"{path}: is a link to a file that does not exist ({path.readlink()})")
        raise InputError(f"{path}: no such file")
    kind = kind_of(status)
    if kind == "directory":
        raise InputError(f"{path}: is a directory, expected an image file")
    if kind != "file":
        raise InputError(f"{path}: is a {kind}, expected a file; read it as - from standard input")
    return status


def open_input(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; InputError if it is not one or cannot be read."""
    check_file(path)
    try:
        stream = os.fdopen(
            os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # it was replaced after the check
        stream.close()
        raise InputError(f"{path}: is no longer a file")
    return stream


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_writable(directory: Path) -> None:
    """Raise OutputError if `directory` or a file in it cannot be created; nothing is left behind."""
    made: list[Path] = []
    try:
        for folder in reversed((directory, *directory.parents)):
            if examine(folder, OutputError) is None:
                folder.mkdir()
                made.append(folder)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        raise OutputError(f"{directory}: cannot be written to: {reason(error)}") from error
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name whose file becomes `path` if the block succeeds and is removed if it fails.

    Creates missing directories above `path` and replaces an existing file. Raises OSError if the system
    refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    scratch = scratch_path(path.parent)
    try:
        yield scratch
        with scratch.open("rb+") as stream:
            os.fsync(stream.fileno())
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """Yield an empty directory that is removed at the end; `sweep` removes that of a killed process."""
    scratch = scratch_path(parent)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        _discard(scratch)


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary stream whose content becomes `path` if the block succeeds; see `new_file`."""
    with new_file(path) as scratch, scratch.open("xb") as stream:
        yield stream


@contextlib.contextmanager
def new_directory(target: Path, *, force: bool, marker: str, only: str | None = None) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` if the block succeeds; otherwise nothing changes.

    `check_replaceable` defines what may be replaced. The old directory is kept until the new one is in its
    place, and restored after any interruption, including Ctrl-C. Raises OSError if the system refuses.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, again=True)
    check_replaceable(target, force=force, marker=marker, only=only)
    scratch = scratch_path(target.parent)
    new, old = scratch / _NEW, scratch / _OLD / target.name
    try:
        new.mkdir(parents=True)
        old.parent.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        _discard(scratch)


def check_replaceable(target: Path, *, force: bool, marker: str, only: str | None = None) -> None:
    """Raise OutputError if a directory may not be written at `target`.

    An existing directory is refused without `force`. With `force` it may be replaced if it is empty, or if it
    holds a file named `marker` and, if `only` is given, every name in it matches this regular expression.
    """
    if not target.is_symlink() and examine(target, OutputError) is None:
        return
    if not force:
        raise OutputError(f"{target}: exists; choose another directory, or replace it with --force")
    if target.is_symlink() or not target.is_dir():
        raise OutputError(f"{target}: is not a directory; choose another one")
    try:
        names = sorted(os.listdir(target))  # noqa: PTH208 - only the names are needed
    except OSError as error:
        raise OutputError(f"{target}: cannot be examined: {reason(error)}") from error
    if names and marker not in names:
        raise OutputError(f"{target}: holds files but no {marker}, so moesr did not make it; choose another")
    foreign = [name for name in names if only and not re.fullmatch(only, name)]
    if foreign:
        raise OutputError(f"{target}: holds other files ({', '.join(foreign[:3])}); choose another one")


_swept: set[Path] = set()


def sweep(directory: Path, *, again: bool = False) -> None:
    """Remove temporary files of dead processes from `directory`, once per process unless `again` is set.

    A directory that a killed process moved aside is restored if nothing has taken its place.
    """
    if directory.absolute() in _swept and not again:
        return
    _swept.add(directory.absolute())
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if path.name.startswith(".moesr-") and _abandoned(path):
                _discard(path)


def _abandoned(path: Path) -> bool:
    """Return True if the process that was writing a temporary file or directory is known to be dead."""
    match = _LEFTOVER.fullmatch(path.name)
    if not match:
        return False
    if match[1] == _host() and os.name != "nt":  # on Windows, signal 0 would end the process
        return not _alive(int(match[2]))
    newest = max((p.lstat().st_mtime for p in (path, *path.rglob("*"))), default=0.0)
    return time.time() - newest > FOREIGN_AGE_S


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _discard(scratch: Path) -> None:
    """Remove a temporary file or directory, after restoring the directory that was moved into it."""
    old = scratch / _OLD
    if old.is_dir():
        for kept in old.iterdir():
            place = scratch.with_name(kept.name)
            if not place.exists():
                kept.rename(place)
    if scratch.is_dir() and not scratch.is_symlink():
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def scratch_path(directory: Path) -> Path:
    """A new name for a temporary file, which `sweep` removes once the process is dead."""
    return directory / f".moesr-{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@functools.cache
def _host() -> str:
    """Return eight characters that identify the machine, its boot and its process namespace."""
    parts = [os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115 - not a path
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
