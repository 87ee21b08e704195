"""A description of the machine that a benchmark runs on, as one line and as JSON values."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from moesr.runtime.system import cpu

FLAGS = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PACKAGES = ("moesr", "torch", "onnxruntime", "onnx", "numpy")


def machine() -> dict[str, Any]:
    """Return CPU model, usable cores, vector extensions, memory and versions; unknown values are left out."""
    flags = cpu.extensions().split()
    return {
        "cpu": cpu.model(),
        "cores": usable_cores(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def machine_line() -> str:
    """Return the description of the machine on one line."""
    m = machine()
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    memory = f", {m['memory_gb']:.0f} GB" if m["memory_gb"] else ""
    return (
        f"{m['cpu']}, {m['cores']} cores ({' '.join(m['flags']) or 'no known extensions'}){memory}, "
        f"{m['system']}, Python {m['python']}, {versions}"
    )


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return cpu.cores() or 1


def load_average() -> float | None:
    """Return the load average of the last minute; None if the system does not provide it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _memory_gb() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
