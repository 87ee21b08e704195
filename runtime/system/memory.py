"""How much memory this process may still take, as far as the operating system tells, and giving it back."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_CGROUPS = (  # (limit, used, statistics): version 2, then version 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes free for use without swapping, within the container's limit; None where it cannot be told.

    `proc` and `cgroup` are the mount points of the two file systems that Linux reports it in.
    """
    figures = [figure for figure in (_system_bytes(proc), _container_bytes(cgroup)) if figure is not None]
    return min(figures, default=None)


def return_freed() -> None:
    """Have the C library give freed memory back to the system, where it is one that keeps it (glibc)."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def readable(count: float) -> str:
    """A number of bytes in words, such as "3.2 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _system_bytes(proc: Path) -> int | None:
    """Memory available on the machine; where the system does not say, half of what it has."""
    kilobytes = _entry(proc / "meminfo", "MemAvailable:")
    if kilobytes is not None:
        return kilobytes * 1024
    if sys.platform == "win32":
        return _windows_bytes()
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _windows_bytes() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "page_total", "page_free")),
            *((name, ctypes.c_ulonglong) for name in ("virtual_total", "virtual_free", "extended_free")),
        )

    status = Status(length=ctypes.sizeof(Status))
    done = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.free) if done else None


def _container_bytes(cgroup: Path) -> int | None:
    """What the control group leaves free, counting its reclaimable file cache as free."""
    for limit_name, used_name, stat_name, cache_name in _CGROUPS:
        limit, used = _number(cgroup / limit_name), _number(cgroup / used_name)
        if limit is not None and used is not None:
            return max(limit - used + (_entry(cgroup / stat_name, cache_name) or 0), 0)
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max" for no limit
        return None


def _entry(path: Path, name: str) -> int | None:
    """The number after `name` in a file of "name number" lines."""
    try:
        lines = (line.split() for line in path.read_text().splitlines())
        return next((int(words[1]) for words in lines if len(words) > 1 and words[0] == name), None)
    except (OSError, ValueError):
        return None


def ran_out_of_memory(text: str) -> bool:
    """Whether a complaint is of memory, the GPU's or the host's, that could not be had."""
    words = text.lower()
    return "out of memory" in words or "outofmemory" in words or ("memory" in words and "alloc" in words)
