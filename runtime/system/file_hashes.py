"""SHA-256 of large files, remembered for as long as a file is not touched.

Hashing a full-width engine takes seconds, its graphs open in tenths. Size, inode and times of change tell
whether a file is still the one that was hashed; what a failing disk changes without a write shows only where
it is hashed anew, which `moesr-doctor` does.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from moesr.runtime.system import files, user_cache

FOLDER = "hashes"
LARGE = 16 << 20
"""Bytes from which a hash is worth remembering."""

SETTLED_NS = 2_000_000_000
"""A file that changed so shortly ago might change again within the clock's tick: its hash is not kept."""


def sha256_of(path: Path, *, anew: bool = False) -> str:
    """Hash of a file's content, hexadecimal; `anew`: of what is on disk now, whatever is remembered."""
    stamp = _stamp(path)
    if stamp["size"] < LARGE:
        return files.sha256_of(path)
    name = f"{FOLDER}/{hashlib.sha256(stamp['path'].encode()).hexdigest()[:24]}.json"
    kept = None if anew else user_cache.read(name)
    if isinstance(kept, dict) and kept | stamp == kept and isinstance(kept.get("sha256"), str):
        return kept["sha256"]
    found = files.sha256_of(path)
    settled = time.time_ns() - max(stamp["modified_ns"], stamp["changed_ns"]) > SETTLED_NS
    if settled and _stamp(path) == stamp:
        user_cache.write(name, stamp | {"sha256": found})
    return found


def _stamp(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": str(path.resolve()),
        "size": status.st_size,
        "inode": status.st_ino,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
    }
