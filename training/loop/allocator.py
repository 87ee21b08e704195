"""The C library's memory, as training wants it."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt


def keep_freed() -> None:
    """Have the C library keep freed memory for itself, where it is glibc.

    Training frees and takes the same large blocks at every step; mapping them anew costs a page fault each
    4 KiB.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(_M_MMAP_MAX, 0)
            library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
