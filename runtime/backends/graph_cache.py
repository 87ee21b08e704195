"""The cache of graphs that a library has prepared for this machine, so that they open at once.

An entry is a directory below `FOLDER` in the cache directory. Its name is derived from all that its content
depends on: the path, hash, size and modification time of the graph's files; the library, its version and
options; the processor. `entry.json` repeats these and lists the entry's own files with their checksums. A
damaged entry is removed and made again; if an entry cannot be written, the graph is not cached.

Entries are removed when the files from which they were made have gone or changed, or when they have not been
used for `UNUSED_AGE_S`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from moesr.runtime.engine.field_types import Bytes, FileName
from moesr.runtime.engine.graph_spec import File
from moesr.runtime.errors import OutputError
from moesr.runtime.system import cpu, files, json_dataclass
from moesr.runtime.system.json_dataclass import Range

FOLDER, RECORD_NAME = "prepared", "entry.json"

ROOM = 8
"""An entry is written only if free disk space is this multiple of the size of the graph's own files.

Winograd kernels are four times as large as the kernels from which they are made.
"""

UNUSED_AGE_S = 30 * 86_400
"""Entries that have not been opened for this time are removed."""

MAX_RECORD_BYTES = 1 << 20
"""A larger entry.json is not read."""

log = logging.getLogger("moesr")

_verified: set[tuple[int, ...]] = set()  # files whose checksums this process has compared


@dataclass(frozen=True)
class Stamp:
    """A file with its path, its size and the time of its last modification."""

    path: str
    size: int
    changed_ns: int


@dataclass(frozen=True)
class Made:
    """A file of an entry."""

    name: FileName
    size: Bytes
    crc32: Annotated[int, Range(0, 2**32 - 1)]


@dataclass(frozen=True)
class Origin:
    """All that a prepared graph depends on."""

    files: tuple[Stamp, ...]
    sha256: tuple[str, ...]
    library: str
    version: str
    options: str
    cpu: str

    @property
    def key(self) -> str:
        """The name of the entry's directory."""
        text = json.dumps(dataclasses.asdict(self))
        return f"{self.library}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


@dataclass(frozen=True)
class Entry:
    """The content of entry.json: the origin of the entry, and its files."""

    origin: Origin
    made: tuple[Made, ...]


def origin(directory: Path, sources: Sequence[File], library: str, version: str, options: str) -> Origin:
    """Return the origin of a graph whose files are in `directory`; OSError if one of them has no status."""
    stamps = tuple(_stamp((directory / file.file).resolve()) for file in sources)
    hashes = tuple(file.sha256 for file in sources)
    machine = f"{cpu.model()} {cpu.extensions()}"
    return Origin(stamps, hashes, library, version, options, hashlib.sha256(machine.encode()).hexdigest())


def find(cache: Path, wanted: Origin, *, verify: bool = True) -> Path | None:
    """Return the directory of the entry for an origin, or None; a damaged entry is removed.

    The files of the entry must be regular files of the recorded sizes and, with `verify`, of the recorded
    checksums. A file whose checksum was compared is not read again by this process until it is touched.
    """
    directory = cache / FOLDER / wanted.key
    if directory.is_symlink() or not directory.is_dir():
        return None
    try:
        entry = _read(directory)
        _check(directory, entry, wanted, verify)
        os.utime(directory / RECORD_NAME)  # stores the time of its last use
        return directory
    except (OSError, ValueError) as error:
        log.info("%s: removed and made again: %s", directory, files.reason(error))
    remove(directory)
    return None


def _read(directory: Path) -> Entry:
    """Return the record of an entry; OSError or ValueError if it is missing or damaged."""
    values = json_dataclass.read_json(directory / RECORD_NAME, MAX_RECORD_BYTES)
    return json_dataclass.build(Entry, values)


def _check(directory: Path, entry: Entry, wanted: Origin, verify: bool) -> None:
    """Raise ValueError or OSError if an entry has another origin or its files differ from those recorded."""
    if entry.origin != wanted:
        raise ValueError(f"{RECORD_NAME} describes another graph")
    for made in entry.made:
        with _opened(directory / made.name) as stream:
            status = os.fstat(stream.fileno())
            if status.st_size != made.size:
                raise ValueError(f"{made.name} has another size than recorded")
            stamp = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, made.crc32
            if verify and stamp not in _verified:
                if _checksum(stream) != made.crc32:
                    raise ValueError(f"{made.name} does not match its recorded checksum")
                _verified.add(stamp)


def _checksum(stream: BinaryIO) -> int:
    """Return the CRC-32 of a file, which finds accidental damage at half the cost of a SHA-256."""
    found = 0
    while block := stream.read(1 << 20):
        found = zlib.crc32(block, found)
    return found


def _opened(path: Path) -> BinaryIO:
    """Open a regular file for reading without following links; ValueError or OSError for anything else."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    stream = os.fdopen(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ValueError(f"{path.name} is not a regular file")
    return stream


def write(cache: Path, made_of: Origin, make: Callable[[Path], None]) -> Path | None:
    """Call `make` to write the files of an entry into an empty directory; None if they cannot be cached.

    An existing entry is replaced, whatever it holds. Exceptions of `make` are passed on.
    """
    folder, needed = cache / FOLDER, ROOM * sum(stamp.size for stamp in made_of.files)
    directory = folder / made_of.key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(f"less than {needed / 1e9:.1f} GB free")
        if not (directory / RECORD_NAME).is_file():
            remove(directory)
        with files.new_directory(directory, force=True, marker=RECORD_NAME) as new:
            make(new)
            record = dataclasses.asdict(Entry(made_of, tuple(_made(new))))
            (new / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (OSError, OutputError) as error:
        log.info("%s is not cached: %s", directory, files.reason(error))
        return None
    return directory


def _made(directory: Path) -> Iterator[Made]:
    for path in sorted(directory.iterdir()):
        with _opened(path) as stream:
            yield Made(path.name, path.stat().st_size, _checksum(stream))


def remove(directory: Path) -> None:
    """Remove an entry, or any other file system entry of its name, if that is possible."""
    if directory.is_dir() and not directory.is_symlink():
        shutil.rmtree(directory, ignore_errors=True)
        return
    try:
        directory.unlink(missing_ok=True)
    except OSError as error:
        log.info("%s is not removed: %s", directory, files.reason(error))


def remove_stale(folder: Path) -> None:
    """Remove entries that are damaged or long unused, and those whose graphs are gone or changed."""
    for directory in folder.iterdir():
        hidden = directory.name.startswith(".")  # another process is writing this entry
        if not hidden and _stale(directory):
            remove(directory)


def _stale(directory: Path) -> bool:
    if directory.is_symlink() or not directory.is_dir():
        return False  # not an entry; it is replaced if its name is needed
    record = directory / RECORD_NAME
    try:
        if time.time() - record.lstat().st_mtime > UNUSED_AGE_S:
            return True
        return any(_stamp(Path(old.path)) != old for old in _read(directory).origin.files)
    except (OSError, ValueError):
        return True


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(str(path), status.st_size, status.st_mtime_ns)
