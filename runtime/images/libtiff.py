"""Silencing libtiff, which writes to stderr about damaged files; Pillow raises the same as errors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
from pathlib import Path

import PIL


@functools.cache
def silence() -> None:
    """Remove the handlers that print, for this process. If libtiff cannot be found, nothing happens."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # drops warnings by default
    with contextlib.suppress(OSError, AttributeError):
        path = _library()
        if path:
            library = ctypes.CDLL(path)
            for function in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
                function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
                function(None)


def _library() -> str | None:
    """Return the path of the libtiff that this process has loaded."""
    if sys.platform == "linux":
        from PIL import _imaging  # noqa: F401 - loads it

        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
        loaded = [line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libtiff" in line]
    else:
        loaded = [str(path) for path in (Path(PIL.__file__).parent / ".dylibs").glob("libtiff*")]
    return loaded[0] if loaded else None
