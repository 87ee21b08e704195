"""CPU model, cores and instruction sets, for cache keys and for choices that depend on them."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path


def model() -> str:
    """The name of the CPU."""
    return _entry("model name") or platform.processor() or platform.machine()


def extensions() -> str:
    """The instruction sets of the CPU, as /proc/cpuinfo lists them; empty on other systems."""
    return _entry("flags") or _entry("Features")


def cores() -> int | None:
    """Logical cores that this process may use; None if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def int8_may_saturate() -> bool:
    """Whether 8-bit products are added in 16 bits, which may overflow, as on x86 CPUs without VNNI."""
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
