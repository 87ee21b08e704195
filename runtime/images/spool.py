"""Rows of an image on disk while they are made, in a temporary file that vanishes with the process.

On Linux the file has no name, so nothing is left of it however the process ends. Elsewhere it has the name of
a temporary file, which is removed at the end of the process, or by the next process that writes in the same
place. Its whole size is reserved when it is made: a full disk is an error before any work, and not a signal
that ends the process in the middle.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moesr.runtime.errors import OutputError
from moesr.runtime.system.files import reason, scratch_path, sweep
from moesr.runtime.system.memory import readable

SPARE_BYTES = 64 << 20
"""Bytes that must stay free on a disk after a spool is made."""

_ZEROS = bytes(1 << 20)


def place_for(folders: Sequence[Path], nbytes: int) -> Path:
    """Return the first of the folders whose disk has room for `nbytes` of spools; OutputError if none has.

    A folder that does not exist yet stands for the nearest one above it that does.
    """
    free: dict[Path, int] = {}
    for folder in folders:
        existing = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), folder)
        try:
            free[existing] = shutil.disk_usage(existing).free
        except OSError:
            continue
        if nbytes + SPARE_BYTES <= free[existing] and os.access(existing, os.W_OK):
            return existing
    found = ", ".join(f"{readable(count)} in {folder}" for folder, count in free.items()) or "nothing"
    raise OutputError(
        f"the work needs {readable(nbytes)} of disk for temporary files, free are {found}; free some, name "
        "a place on another disk with -o, or set TMPDIR to one"
    )


class Spool:
    """An array [H, W, C] in a temporary file. `pixels` maps it into memory; `read` and `write` do without."""

    def __init__(self, folder: Path, height: int, width: int, channels: int, dtype: Any) -> None:
        """`folder` must exist. OutputError if the file cannot be made or its disk has no room for it."""
        self.shape, self.dtype = (height, width, channels), np.dtype(dtype)
        self._row_bytes = width * channels * self.dtype.itemsize
        self.nbytes = height * self._row_bytes
        try:
            self._file, self.path, self._removal = _temporary(folder)
            _reserve(self._file.fileno(), self.nbytes)
        except OSError as error:
            raise OutputError(
                f"{folder}: has no room for a temporary file of {readable(self.nbytes)}: {reason(error)}"
            ) from error
        self._map: mmap.mmap | None = None

    @property
    def pixels(self) -> np.ndarray:
        """The array, mapped from the file; it can be used after the spool is closed."""
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), self.nbytes)
        return np.frombuffer(self._map, self.dtype).reshape(self.shape)

    def write(self, start: int, rows: np.ndarray) -> None:
        """Replace the rows from `start` on; OutputError if the system refuses."""
        if not hasattr(os, "pwrite"):
            self.pixels[start : start + len(rows)] = rows
            return
        data = np.ascontiguousarray(rows, self.dtype).data.cast("B")
        at = start * self._row_bytes
        try:
            while data:
                count = os.pwrite(self._file.fileno(), data, at)
                data, at = data[count:], at + count
        except OSError as error:
            raise OutputError(f"a temporary file cannot be written to: {reason(error)}") from error

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return a copy of some rows; OutputError if the system refuses."""
        if not hasattr(os, "preadv"):
            return self.pixels[start:stop].copy()
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        data, at = rows.data.cast("B"), start * self._row_bytes
        try:
            while data:
                count = os.preadv(self._file.fileno(), [data], at)
                if not count:
                    raise OutputError("a temporary file was cut short; run again")
                data, at = data[count:], at + count
        except OSError as error:
            raise OutputError(f"a temporary file cannot be read: {reason(error)}") from error
        return rows

    def release(self) -> None:
        """Let the system take back the memory of mapped rows, which stay in the file."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk space back once no array of `pixels` is left; closing twice does nothing."""
        self._map = None
        self._file.close()
        self._removal()


def _temporary(folder: Path) -> tuple[Any, Path, Callable[[], object]]:
    """Return an open temporary file, a path by which a library can open it, and what removes it."""
    if sys.platform == "linux":
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        return file, Path(f"/proc/self/fd/{file.fileno()}"), lambda: None
    sweep(folder)
    path = scratch_path(folder)
    file = path.open("x+b", buffering=0)
    return file, path, weakref.finalize(file, _remove, path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Give a file its size and the room on the disk for it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
        return
    for start in range(0, nbytes, len(_ZEROS)):
        os.write(descriptor, _ZEROS[: nbytes - start])
