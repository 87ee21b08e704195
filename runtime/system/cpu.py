"""What the processor is, as far as results and timings depend on it."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path


def model() -> str:
    """The processor's name."""
    return _entry("model name") or platform.processor() or platform.machine()


def extensions() -> str:
    """The instruction sets that it lists; empty where the system does not say."""
    return _entry("flags") or _entry("Features")


def cores() -> int | None:
    """How many of its logical cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def int8_may_saturate() -> bool:
    """Whether it is an x86 without VNNI: sums of products of 8 bits are then made in 16, and may overflow."""
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
