"""CPU model, cores and instruction sets, for cache keys and for choices that depend on them."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path


def model() -> str:
    """Return the name of the CPU."""
    return _entry("model name") or platform.processor() or platform.machine()


def extensions() -> str:
    """Return the instruction sets of the CPU from /proc/cpuinfo; an empty set on other systems."""
    return _entry("flags") or _entry("Features")


def cores() -> int | None:
    """Return the number of logical cores that this process may use; None if the system does not report it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def int8_may_saturate() -> bool:
    """Return True if 8-bit products are summed in 16 bits and may overflow, as on x86 CPUs without VNNI."""
    return "avx2" in extensions() and "vnni" not in extensions()


def _entry(name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else ""


@functools.cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
