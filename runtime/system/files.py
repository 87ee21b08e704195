"""Files and directories that are whole or absent, and plain reasons where a path cannot be used.

What is being written lies beside its place as `.moesr-HOST-PID-RANDOM.tmp` and is renamed when it is whole. A
process that is killed leaves it there: the next one that writes in that place removes it, and puts back what
a directory's replacement had moved aside.
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
"""Leftovers whose owner cannot be asked (another machine or container) are removed at this age."""

_LEFTOVER = re.compile(r"\.moesr-(?:([0-9a-f]{8})-)?(\d+)-[0-9a-f]+\.tmp")
_NEW, _OLD = "new", "old"  # inside the temporary directory of `new_directory`

_PERMISSIONS = "check the permissions of it and of the directories above it"
_CURES = {
    errno.ENAMETOOLONG: "shorten it",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ELOOP: "its links lead in a circle",
    errno.ENOSPC: "free some",
}


def reason(error: Exception) -> str:
    """What went wrong with a path, in the system's words, and what to do where that is known."""
    if isinstance(error, OSError) and error.strerror:
        cure = _CURES.get(error.errno or 0)
        return f"{error.strerror}; {cure}" if cure else error.strerror
    if isinstance(error, UnicodeError) or "null byte" in str(error) or "null char" in str(error):
        return f"not a possible file name ({error}); name another"
    return str(error) or type(error).__name__


def examine(path: Path, error: type[MoesrError] = InputError) -> os.stat_result | None:
    """`path`'s status, links followed; None where nothing is there. `error` where it cannot be looked at."""
    try:
        return os.stat(path)  # noqa: PTH116 - pathlib hides a NUL character
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be looked at: {reason(problem)}") from problem


def kind_of(status: os.stat_result) -> str:
    """What is at a path, in words: "file", "directory", "pipe", "socket", "device"."""
    mode = status.st_mode
    for test, name in ((stat.S_ISREG, "file"), (stat.S_ISDIR, "directory"), (stat.S_ISFIFO, "pipe")):
        if test(mode):
            return name
    return "socket" if stat.S_ISSOCK(mode) else "device"


def check_file(path: Path) -> os.stat_result:
    """Status of a regular file; InputError for anything else, since reading a pipe could wait for ever."""
    status = examine(path)
    if status is None:
        if path.is_symlink():
            raise InputError(f"{path}: a link that leads nowhere (to {path.readlink()})")
        raise InputError(f"{path}: no such file")
    kind = kind_of(status)
    if kind == "directory":
        raise InputError(f"{path}: is a directory, expected an image file")
    if kind != "file":
        raise InputError(f"{path}: is a {kind}, expected a file; save what comes from it as a file first")
    return status


def open_input(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; InputError if it is none or cannot be read."""
    check_file(path)
    try:
        stream = os.fdopen(
            os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # it was replaced since
        stream.close()
        raise InputError(f"{path}: is no longer a file")
    return stream


def sha256_of(path: Path) -> str:
    """Hash of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_writable(directory: Path) -> None:
    """Raise OutputError where files cannot be made in `directory`, or it cannot be made; leaves no trace."""
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
    """A name to write a file at that becomes `path` when the block succeeds, and nothing when it does not.

    Makes the directories above and replaces a file that is there. OSError where the system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    scratch = path.with_name(_scratch_name())
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
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """A binary stream whose content becomes `path` when the block succeeds; see `new_file`."""
    with new_file(path) as scratch, scratch.open("xb") as stream:
        yield stream


@contextlib.contextmanager
def new_directory(target: Path, *, force: bool, marker: str, only: str | None = None) -> Iterator[Path]:
    """An empty directory that becomes `target` when the block succeeds; otherwise all stays as it was.

    What may be replaced: see `check_replaceable`. It is kept until the new one is in its place, and put back
    should anything come between, Ctrl-C included. OSError where the system refuses.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, again=True)
    check_replaceable(target, force=force, marker=marker, only=only)
    scratch = target.with_name(_scratch_name())
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
    """Raise OutputError where a directory may not be written at `target`.

    What exists is refused without `force`. With it, a directory is replaced that is empty or ours: it holds a
    file named `marker` and, where `only` is given, no name that this regular expression does not match.
    """
    if not target.is_symlink() and examine(target, OutputError) is None:
        return
    if not force:
        raise OutputError(f"{target}: exists; choose another directory, or replace it with --force")
    if target.is_symlink() or not target.is_dir():
        raise OutputError(f"{target}: is not a directory; choose another one")
    try:
        names = sorted(os.listdir(target))  # noqa: PTH208 - names are all that is wanted
    except OSError as error:
        raise OutputError(f"{target}: cannot be looked at: {reason(error)}") from error
    if names and marker not in names:
        raise OutputError(f"{target}: holds files but no {marker}, so it is none of ours; choose another one")
    foreign = [name for name in names if only and not re.fullmatch(only, name)]
    if foreign:
        raise OutputError(f"{target}: holds other files ({', '.join(foreign[:3])}); choose another one")


_swept: set[Path] = set()


def sweep(directory: Path, *, again: bool = False) -> None:
    """Remove what processes that are gone left in `directory`, once a process unless `again`.

    A directory that a killed process had moved aside, and put no other in its place, goes back there.
    """
    if directory.absolute() in _swept and not again:
        return
    _swept.add(directory.absolute())
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if path.name.startswith(".moesr-") and _abandoned(path):
                _discard(path)


def _abandoned(path: Path) -> bool:
    """Whether the process that was writing a temporary file or directory is gone, as far as one can know."""
    match = _LEFTOVER.fullmatch(path.name)
    if not match:
        return False
    if match[1] == _host() and os.name != "nt":  # signal 0 would end a process there
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
    """Remove a temporary file or directory, after what it holds of others' has been put back."""
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


def _scratch_name() -> str:
    return f".moesr-{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@functools.cache
def _host() -> str:
    """Eight characters that differ wherever a process number would mean another process."""
    parts = [os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115 - not a path
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
