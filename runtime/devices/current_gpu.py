"""Leaves the GPU that is current in a caller's thread as it was.

CUDA has one current context per thread, and libraries of the caller use it: after `set_current` on another
GPU, `torch.empty(.., device="cuda")` would allocate there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Iterator

made_current = threading.local()
"""`made_current.index` is the GPU that the runtime has made current in the calling thread, if it has."""


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Restore the calling thread's current context after a `with` block.

    It does nothing without a driver.
    """
    driver = _driver()
    before = ctypes.c_void_p()
    if driver is not None:
        driver.cuCtxGetCurrent(ctypes.byref(before))  # leaves None if the driver is not initialized
    made_current.index = None  # the caller may have made another GPU current since
    try:
        yield
    finally:
        made_current.index = None
        if driver is not None:
            driver.cuCtxSetCurrent(before)


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """Return the driver's library; None if there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
