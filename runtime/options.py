"""Checks of options that need no engine; each returns the checked value or raises UsageError."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Collection
from numbers import Real
from typing import Any

from moesr.runtime.errors import UsageError

MAX_SEED = 2**64 - 1
MAX_REUSE = 100
MAX_BATCH = 256
"""The largest number of tiles per run that users can set."""

MAX_GUIDANCE = 100.0
DEFAULT_SEED, DEFAULT_COLOR_FIX = 42, "adain"
PRECISIONS = ("graph", "bf16", "auto")
"""Arithmetic precisions: that of the graphs, bfloat16 if the backend has it, or the faster of the two."""


def whole(option: str, value: Any, least: int, most: int) -> int:
    """Return `value` as an int if it is a whole number in the range, also one of NumPy, but not a boolean."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise UsageError(f"{option} is {shown(value)}, expected a whole number from {least} to {most}")
    return number


def real(option: str, value: Any, most: float) -> float:
    """Return `value` as a float if it is a number from 0 to `most`, but not a boolean."""
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else -1.0
    if not 0.0 <= number <= most:  # compared before the conversion, as a float cannot hold every number
        raise UsageError(f"{option} is {shown(value)}, expected a number from 0 to {most:.0f}")
    return float(number)


def one_of(option: str, value: Any, choices: Collection[str]) -> str:
    """Return `value` if it is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{option} is {shown(value)}, expected one of {', '.join(choices)}")
    return value


def shown(value: Any) -> str:
    """Return a value as error messages show it, in at most 60 characters."""
    try:
        text = repr(value)
    except Exception:  # numbers of more than 4300 digits, and objects that cannot be printed
        text = f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_flag(option: str, value: Any) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{option} is {shown(value)}, expected True or False")
    return value


def check_threads(value: Any) -> int | None:
    """Check the number of CPU threads, at most four per logical core; None lets the backend choose."""
    return None if value is None else whole("threads", value, 1, 4 * (os.cpu_count() or 256))


def check_seed(value: Any) -> int:
    """Check the seed of the noise, 0 to 2**64 - 1."""
    return whole("seed", value, 0, MAX_SEED)


def check_fidelity(value: Any) -> float:
    """Check the fidelity to the input, 0 to 1."""
    return real("fidelity", value, 1.0)


def check_reuse(value: Any) -> int:
    """Check the interval between steps that compute all levels of an expert, 1 (every step) to 100."""
    return whole("reuse", value, 1, MAX_REUSE)


def check_guidance(value: Any) -> float:
    """Check the strength of guidance, 0 (only the negative prompt) to 100; 1 means no guidance."""
    return real("guidance", value, MAX_GUIDANCE)


def check_device(value: Any) -> str | None:
    """Check the name of a device; only cuda takes a number. None lets the backend choose."""
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"[a-z]+|cuda:\d+", value):
        raise UsageError(f"device is {shown(value)}, expected a name such as cpu, cuda or cuda:1")
    return value
