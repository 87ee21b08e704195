"""The user's cache directory: small JSON files with measurements and hashes, which may be deleted anytime.

No result depends on them. A value that cannot be read counts as absent, and a value that cannot be written is
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
"""Largest file that is read back; larger ones were not written by this module."""

log = logging.getLogger("moesr")


def directory() -> Path | None:
    """`$MOESR_CACHE`, `$XDG_CACHE_HOME/moesr` or `~/.cache/moesr`, existing or not; None without a home.

    A variable that holds a relative path is ignored, as the XDG specification demands.
    """
    own, shared = (Path(os.environ.get(name, "")) for name in ("MOESR_CACHE", "XDG_CACHE_HOME"))
    if own.is_absolute():
        return own
    try:
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "moesr"
    except RuntimeError:
        return None


def read(name: str) -> Any:
    """The value kept under a name; None if there is none, or none that can be read safely."""
    folder = directory()
    try:
        return json_dataclass.read_json(folder / name, MAX_BYTES) if folder else None
    except (OSError, ValueError):
        return None


def write(name: str, value: Any) -> None:
    """Keep a value under a name if the cache directory can be written; the log says if it cannot."""
    folder = directory()
    if folder is None:
        return
    try:
        with files.write_atomically(folder / name) as stream:
            stream.write(json.dumps(value, indent=1).encode())
    except (OSError, ValueError) as error:
        log.info("%s is not kept: %s", folder / name, files.reason(error))
