"""The exceptions for everything that a user can cause or repair.

A message names the wrong value, the expected value and the remedy. Command-line programs print it on one line
and exit with the `exit_code` of its class: 1 some inputs failed, 2 usage, 3 engine unusable, 4 out of memory.
"""

from __future__ import annotations

from typing import ClassVar


class MoesrError(Exception):
    """The base class of all errors raised on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(MoesrError):
    """An input file or image cannot be used; other inputs are unaffected."""


class OutputError(MoesrError):
    """A result cannot be written to its file; other inputs are unaffected."""


class UsageError(MoesrError):
    """An option or argument is wrong or cannot be used here; no work was started."""

    exit_code = 2


class EngineError(MoesrError):
    """An engine directory, checkpoint or backend is missing, damaged or does not fit this runtime."""

    exit_code = 3


class NonFiniteError(EngineError):
    """A graph produced NaN or infinite values for one image; other images may still succeed."""


class MemoryLimitError(MoesrError):
    """The work needs more memory than this machine has free."""

    exit_code = 4
