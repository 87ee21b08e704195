"""The user's cache directory: small JSON files with measurements and hashes, which may be deleted anytime.

No result depends on them. A file that cannot be read counts as absent, and a value that cannot be written is
not kept.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from moesr.runtime.system import files, json_dataclass

MAX_BYTES = 1 << 20
"""Larger files are not read back, because this module does not write them."""

log = logging.getLogger("moesr")


def directory() -> Path | None:
    """Return `$MOESR_CACHE`, `$XDG_CACHE_HOME/moesr` or `~/.cache/moesr`, existing or not.

    The result is None if there is no home directory. A variable with a relative path is ignored, as the XDG
    specification demands.
    """
    own, shared = (Path(os.environ.get(name, "")) for name in ("MOESR_CACHE", "XDG_CACHE_HOME"))
    if own.is_absolute():
        return own
    try:
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "moesr"
    except RuntimeError:
        return None


def read(name: str) -> Any:
    """Return the value stored under a name, or None if it is absent or cannot be read safely."""
    folder = directory()
    try:
        return json_dataclass.read_json(folder / name, MAX_BYTES) if folder else None
    except (OSError, ValueError):
        return None


def write(name: str, value: Any) -> None:
    """Store a value under a name; if the cache directory cannot be written, only the log says so."""
    folder = directory()
    if folder is None:
        return
    try:
        with files.write_atomically(folder / name) as stream:
            stream.write(json.dumps(value, indent=1).encode())
    except (OSError, ValueError) as error:
        log.info("%s is not cached: %s", folder / name, files.reason(error))
