"""Loading TensorRT in either flavor, `tensorrt` for data centers or `tensorrt_rtx`, in this module only."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesr.runtime.errors import EngineError

FLAVOURS = ("tensorrt", "tensorrt_rtx")
"""The flavors in order of preference."""

EXTRAS = {"tensorrt": "moesr[tensorrt]", "tensorrt_rtx": "moesr[tensorrt-rtx]"}


@dataclass(frozen=True, eq=False)
class Library:
    """A loaded flavor. `errors` holds the error messages that it has logged."""

    flavour: str
    version: str
    module: Any
    logger: Any
    errors: list[str] = field(default_factory=list)

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds plans for GPUs that are not in this machine."""
        return self.flavour == "tensorrt_rtx"

    def complaint(self) -> str:
        """Return the errors logged since the last call, in one line of at most 400 characters."""
        text = "; ".join(dict.fromkeys(self.errors)) or "the library gives no reason"
        self.errors.clear()
        return f"{text:.400}"

    def __str__(self) -> str:
        return f"{self.flavour} {self.version}"


@functools.cache
def load(flavour: str | None = None) -> Library:
    """Load a flavor by name, or the first one that loads; EngineError says what to install."""
    reasons = []
    for name in [flavour] if flavour else FLAVOURS:
        try:
            return _library(name, _MODULES[name]())
        except (ImportError, OSError) as error:
            reasons.append(f"{name} does not load ({error}); install it with: pip install '{EXTRAS[name]}'")
    raise EngineError("; ".join(reasons))


def _library(flavour: str, module: Any) -> Library:
    errors: list[str] = []

    class Collector(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= module.ILogger.Severity.ERROR:
                errors.append(" ".join(message.split()))

    return Library(flavour, module.__version__, module, Collector(), errors)


def _tensorrt() -> Any:
    return importlib.import_module("tensorrt")


def _tensorrt_rtx() -> Any:
    """Load the two shared libraries whose symbols the bindings need; their package does not load them."""
    try:
        return importlib.import_module("tensorrt_rtx")
    except ImportError:
        found = importlib.util.find_spec("tensorrt_rtx_libs")
        if found is None or not found.submodule_search_locations:
            raise
    folder = Path(next(iter(found.submodule_search_locations)))
    if sys.platform != "win32":  # on Windows the bindings find the libraries themselves
        for name in ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"):
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_rtx_bindings")


_MODULES: dict[str, Callable[[], Any]] = {"tensorrt": _tensorrt, "tensorrt_rtx": _tensorrt_rtx}
