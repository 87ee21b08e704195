"""Settings of the C library's memory allocator for training."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt


def keep_freed() -> None:
    """Make glibc keep freed memory in the process; other C libraries are left as they are.

    Training frees and allocates the same large blocks at every step; mapping them again would cost a page
    fault per 4 KiB.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(_M_MMAP_MAX, 0)
            library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
