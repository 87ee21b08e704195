"""SHA-256 of files, cached in the user's cache as long as a file is not touched.

Hashing a full-width engine takes seconds while its graphs open in tenths of a second. A cached hash is valid
as long as the size, the inode and the times of the last modification and change are the same. Damage by a
failing disk changes none of these; `moesr-doctor` finds it, because it always reads the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from moesr.runtime.system import files, user_cache

FOLDER = "hashes"

LARGE = 4 << 20
"""Hashes of files of at least this size in bytes are cached."""

SETTLED_NS = 2_000_000_000
"""The hash of a file that changed within this time is not cached: another change may get the same time."""


@dataclass(frozen=True)
class Stamp:
    """Properties of a file, at least one of which changes when the file is modified or replaced."""

    size: int
    inode: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Return the stamp of a file from its status."""
        return cls(status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def sha256_of(path: Path, *, anew: bool = False) -> str:
    """Return the hash of a file's content in hexadecimal.

    With `anew` the file is read even if its hash is cached.
    """
    stamp = Stamp.of(path.stat())
    known = None if anew else _recall(path, stamp)
    if known:
        return known
    found = files.sha256_of(path)
    if Stamp.of(path.stat()) == stamp:
        _remember(path, stamp, found)
    return found


def sha256_of_stream(stream: BufferedReader, path: Path) -> str:
    """Return the hash of an opened file in hexadecimal, from the cache or by reading it from its beginning.

    `path` is the name under which the hash is cached. The position in the stream afterwards is undefined.
    """
    stamp = Stamp.of(os.fstat(stream.fileno()))
    known = _recall(path, stamp)
    if known:
        return known
    stream.seek(0)
    found = hashlib.file_digest(stream, "sha256").hexdigest()
    if Stamp.of(os.fstat(stream.fileno())) == stamp:
        _remember(path, stamp, found)
    return found


def _name(path: Path) -> str:
    """Return the name of the cache entry of a path."""
    return f"{FOLDER}/{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]}.json"


def _recall(path: Path, stamp: Stamp) -> str | None:
    """Return the cached hash of a file with this stamp, or None."""
    if stamp.size < LARGE:
        return None
    kept, wanted = user_cache.read(_name(path)), _entry(path, stamp)
    if isinstance(kept, dict) and kept | wanted == kept and isinstance(kept.get("sha256"), str):
        return kept["sha256"]
    return None


def _remember(path: Path, stamp: Stamp, digest: str) -> None:
    settled = time.time_ns() - max(stamp.modified_ns, stamp.changed_ns) > SETTLED_NS
    if settled and stamp.size >= LARGE:
        user_cache.write(_name(path), _entry(path, stamp) | {"sha256": digest})


def _entry(path: Path, stamp: Stamp) -> dict[str, str | int]:
    return {"path": str(path.resolve()), **dataclasses.asdict(stamp)}
