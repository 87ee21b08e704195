"""The deployment runtime: `Upscaler`, which is loaded when it is first named, and its errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesr.runtime.errors import (
    EngineError,
    InputError,
    MemoryLimitError,
    MoesrError,
    NonFiniteError,
    OutputError,
    UsageError,
)

if TYPE_CHECKING:
    from moesr.runtime.upscaler import Upscaler

__all__ = [
    "EngineError",
    "InputError",
    "MemoryLimitError",
    "MoesrError",
    "NonFiniteError",
    "OutputError",
    "Upscaler",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    """Load `Upscaler` at its first use; programs import this package before they can handle Ctrl-C."""
    if name != "Upscaler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moesr.runtime.upscaler import Upscaler

    return Upscaler
