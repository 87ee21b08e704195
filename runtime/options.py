"""Checks of options that mean something without an engine; each returns the value or raises UsageError."""

from __future__ import annotations

import operator
import os
import re
from numbers import Real
from typing import Any

from moesr.runtime.errors import UsageError

MAX_SEED = 2**64 - 1
MAX_REUSE = 100
MAX_GUIDANCE = 100.0
DEFAULT_SEED, DEFAULT_COLOR_FIX = 42, "adain"
PRECISIONS = ("graph", "bf16", "auto")
"""Of the arithmetic: as the graphs say; less where a backend can; whichever was measured the fastest."""


def whole(option: str, value: Any, least: int, most: int) -> int:
    """`value` as an int, where it is a whole number (NumPy's too, but not a truth value) in the range."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise UsageError(f"{option} is {value!r}, expected a whole number from {least} to {most}")
    return number


def check_flag(option: str, value: Any) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{option} is {value!r}, expected True or False")
    return value


def check_threads(value: Any) -> int | None:
    """CPU threads, at most four a logical core; None leaves the choice to the backend."""
    return None if value is None else whole("threads", value, 1, 4 * (os.cpu_count() or 256))


def check_seed(value: Any) -> int:
    """Seed of the noise, 0 to 2**64 - 1."""
    return whole("seed", value, 0, MAX_SEED)


def check_fidelity(value: Any) -> float:
    """Fidelity to the input, 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
        raise UsageError(f"fidelity is {value!r}, expected a number from 0 to 1")
    return float(value)


def check_reuse(value: Any) -> int:
    """Steps from one that computes all of an expert to the next, 1 (all do) to 100."""
    return whole("reuse", value, 1, MAX_REUSE)


def check_guidance(value: Any) -> float:
    """Strength of classifier-free guidance: 0 is the negative prompt alone, 1 none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) <= MAX_GUIDANCE:
        raise UsageError(f"guidance is {value!r}, expected a number from 0 to {MAX_GUIDANCE:.0f}")
    return float(value)


def check_device(value: Any) -> str | None:
    """Name of a device, of which only cuda takes a number; None leaves the choice to the backend."""
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"[a-z]+|cuda:\d+", value):
        raise UsageError(f"device is {value!r}, expected a name such as cpu, cuda or cuda:1")
    return value
