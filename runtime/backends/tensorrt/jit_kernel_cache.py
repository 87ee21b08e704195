"""The cache of the kernels that TensorRT-RTX compiles when a plan first runs on a GPU."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from moesr.runtime.system.files import reason, write_atomically

log = logging.getLogger("moesr")


class CompiledKernels:
    """The cache file of one plan's kernels; a file of another driver, GPU or library version is not used."""

    def __init__(self, path: Path | None) -> None:
        """Use the cache file at `path`; without a path nothing is cached."""
        self._path, self._cache, self._kept = path, None, b""

    def attach(self, config: Any) -> None:
        """Make the contexts of a runtime configuration use this cache and add new kernels to it."""
        if self._path is None:
            return
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                self._kept = self._path.read_bytes()
            if self._kept and not self._cache.deserialize(self._kept):
                log.info(
                    "%swas made with another driver, GPU or version; kernels are compiled again", self._path
                )
                self._kept = b""
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write the file if kernels were compiled since it was last read or written."""
        made = self._cache.serialize() if self._cache is not None else None
        data = b"" if made is None else bytes(made)
        if self._path is None or not data or data == self._kept:
            return
        self._kept = data
        try:
            with write_atomically(self._path) as stream:
                stream.write(data)
        except OSError as error:
            log.info("%s is not cached: %s", self._path, reason(error))
