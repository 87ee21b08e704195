"""Graphs as a library has prepared them for this machine, kept so that they open at once.

An entry is a directory of `FOLDER` in the cache directory. Its name is made of all that its content depends
on: the graph's files, by place, hash, size and time of change; the library, its version and options; the
processor. `entry.json` says the same and what files the entry has. Nothing depends on an entry: one that is
damaged is removed, and what cannot be written is not kept.

Entries go when the files that they were made of have gone or changed, or when they were not used for long.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime.engine.graph_spec import File
from moesr.runtime.errors import OutputError
from moesr.runtime.system import cpu, files, json_dataclass

FOLDER, RECORD_NAME = "prepared", "entry.json"

ROOM = 8
"""Free disk space that is asked for before an entry is written, over the size of the graph's own files.

Winograd's kernels are four times the size of those that they come from.
"""

UNUSED_AGE_S = 30 * 86_400
"""Entries that were not opened for so long are removed."""

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class Stamp:
    """A file by its place, and what tells that it was changed."""

    path: str
    size: int
    changed_ns: int


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
        """Name of the entry's directory."""
        text = json.dumps(dataclasses.asdict(self))
        return f"{self.library}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


@dataclass(frozen=True)
class Entry:
    """What entry.json holds: the origin, and the entry's own files."""

    origin: Origin
    made: tuple[Stamp, ...]


def origin(directory: Path, sources: Sequence[File], library: str, version: str, options: str) -> Origin:
    """The origin of a graph whose files are in `directory`; OSError where one cannot be looked at."""
    stamps = tuple(_stamp((directory / file.file).resolve()) for file in sources)
    hashes = tuple(file.sha256 for file in sources)
    machine = f"{cpu.model()} {cpu.extensions()}"
    return Origin(stamps, hashes, library, version, options, hashlib.sha256(machine.encode()).hexdigest())


def find(cache: Path, wanted: Origin) -> Path | None:
    """The directory of an entry whose files are what was written; None where there is none."""
    directory = cache / FOLDER / wanted.key
    if not directory.is_dir():
        return None
    try:
        entry = json_dataclass.build(Entry, json.loads((directory / RECORD_NAME).read_text(encoding="utf-8")))
        if entry.origin == wanted and all(
            _stamp(directory / made.path, made.path) == made for made in entry.made
        ):
            (directory / RECORD_NAME).touch()  # when it was used last
            return directory
        log.info("%s: not what was written there; made again", directory)
    except (OSError, ValueError) as error:
        log.info("%s: made again: %s", directory, files.reason(error))
    return None


def write(cache: Path, made_of: Origin, make: Callable[[Path], None]) -> Path | None:
    """Have `make` write an entry's files into an empty directory, and keep them; None where that cannot be.

    What `make` raises is raised.
    """
    folder, needed = cache / FOLDER, ROOM * sum(stamp.size for stamp in made_of.files)
    directory = folder / made_of.key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(f"less than {needed / 1e9:.1f} GB free")
        with files.new_directory(directory, force=True, marker=RECORD_NAME) as new:
            make(new)
            made = tuple(_stamp(path, path.name) for path in sorted(new.iterdir()))
            record = dataclasses.asdict(Entry(made_of, made))
            (new / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (OSError, OutputError) as error:
        log.info("%s is not kept: %s", directory, files.reason(error))
        return None
    return directory


def remove(directory: Path) -> None:
    """Remove an entry, if that can be done."""
    shutil.rmtree(directory, ignore_errors=True)


def remove_stale(folder: Path) -> None:
    """Remove entries whose graphs are gone or changed, and those that were not used for `UNUSED_AGE_S`."""
    for directory in folder.iterdir():
        record = directory / RECORD_NAME
        if record.is_file() and _stale(record):
            remove(directory)


def _stale(record: Path) -> bool:
    try:
        if time.time() - record.stat().st_mtime > UNUSED_AGE_S:
            return True
        entry = json_dataclass.build(Entry, json.loads(record.read_text(encoding="utf-8")))
        return any(_stamp(Path(old.path)) != old for old in entry.origin.files)
    except (OSError, ValueError):
        return True


def _stamp(path: Path, name: str | None = None) -> Stamp:
    status = path.stat()
    return Stamp(name or str(path), status.st_size, status.st_mtime_ns)
