"""The deployment runtime: `Upscaler` and its errors."""

from moesr.runtime.errors import (
    EngineError,
    InputError,
    MemoryLimitError,
    MoesrError,
    NonFiniteError,
    OutputError,
    UsageError,
)
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
