"""The memory of this process: how much is available, how it is given back, and errors that say it ran out."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from pathlib import Path

_CGROUPS = (  # names of (limit, used, statistics) in version 2, then in version 1 of control groups
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
)

_SHORTAGE = re.compile(
    r"out[ _]?of[ _]?(?:(?:host|device|gpu|cuda)[ _])?memory"
    r"|(?:not enough|insufficient) (?:\w+ )?memory"
    r"|\bbad[_ ]alloc(?:ation)?\b"
    r"|\b(?:can't|cannot|can not|could not|couldn't|unable to|failed to|failure to) alloc(?:ate)?\b"
    r"|can't start new thread"  # the thread's stack finds no memory, or there are too many threads
    r"|memory allocation"
    r"|alloc(?:ation)?[ _]fail(?:ed|ure)"
    r"|allocation of .{1,60} failed"
    r"|memory .{0,60}could not be allocated"
    r"|memory ?object ?allocation|cudaErrorMemoryAllocation"
    r"|available memory of \d+ is smaller than requested",
    re.IGNORECASE,
)
"""Phrases by which ONNX Runtime, OpenVINO, TensorRT, CUDA and the C++ library report failed allocations."""


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that are free for use without swapping, within all limits, or None if that is unknown.

    The limits of the process (`ulimit -v` and `-d`), of its control group and of the groups above count.
    `proc` and `cgroup` are the mount points of the two file systems in which Linux reports memory.
    """
    groups = (_container_bytes(folder) for folder in _groups(proc, cgroup))
    figures = (_system_bytes(proc), _process_bytes(proc), *groups)
    return min((figure for figure in figures if figure is not None), default=None)


def return_freed() -> None:
    """Make glibc return freed memory to the system; other C libraries do so by themselves."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def readable(count: float) -> str:
    """Format a number of bytes, such as "3.2 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _system_bytes(proc: Path) -> int | None:
    """Return the memory available on the machine, or half of its memory if the system does not report it."""
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


def _process_bytes(proc: Path) -> int | None:
    """Return the memory that the limits of this process leave free; None without limits."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    free = []
    for limit, used in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most, kilobytes = resource.getrlimit(limit)[0], _entry(proc / "self" / "status", used)
        if most != resource.RLIM_INFINITY and kilobytes is not None:
            free.append(max(most - kilobytes * 1024, 0))
    return min(free, default=None)


def _groups(proc: Path, cgroup: Path) -> list[Path]:
    """Return the directories of this process's control groups and those above them, which may have limits."""
    folders = [cgroup, cgroup / "memory"]  # version 2, then version 1
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        number, names, path = [*line.split(":", 2), "", ""][:3]
        inside = [part for part in path.split("/") if part not in ("", "..")]
        if number == "0" or "memory" in names.split(","):
            root = cgroup if number == "0" else cgroup / "memory"
            folders += [root.joinpath(*inside[:count]) for count in range(1, len(inside) + 1)]
    return folders


def _container_bytes(cgroup: Path) -> int | None:
    """Return the memory that a control group leaves free; its reclaimable file cache counts as free."""
    for limit_name, used_name, stat_name, cache_name in _CGROUPS:
        limit, used = _number(cgroup / limit_name), _number(cgroup / used_name)
        if limit is not None and used is not None:
            return max(limit - used + (_entry(cgroup / stat_name, cache_name) or 0), 0)
    return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # the file is absent, or says "max" for no limit
        return None


def _entry(path: Path, name: str) -> int | None:
    """Return the number after `name` in a file of "name number" lines."""
    try:
        lines = (line.split() for line in path.read_text().splitlines())
        return next((int(words[1]) for words in lines if len(words) > 1 and words[0] == name), None)
    except (OSError, ValueError):
        return None


def ran_out_of_memory(problem: BaseException | str, *paths: Path | str) -> bool:
    """Return True if an error or a library's message says that memory of the host or a GPU ran out.

    Only whole phrases of allocators count. Paths in the message do not: words with a slash are ignored, and
    so are the given `paths` and their file names, which may contain any words and spaces. An OSError is
    judged by its number alone, because its text contains a file name.
    """
    if isinstance(problem, MemoryError):
        return True
    if isinstance(problem, OSError) and problem.errno is not None:
        return problem.errno == errno.ENOMEM
    text = str(problem)
    for path in sorted(map(str, paths), key=len, reverse=True):
        for name in (path, Path(path).name):
            text = text.replace(name, " ") if name else text
    words = " ".join(word for word in text.split() if "/" not in word and "\\" not in word)
    return _SHORTAGE.search(words) is not None and "static TLS block" not in words
