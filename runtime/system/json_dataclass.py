"""Reading JSON files safely, and building frozen dataclasses from their values.

Manifests, checkpoints, recipes, kernel tables and cache entries are all read here, so that one place limits
the size of a file, the depth of its nesting and the range of its numbers.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import os
import re
import stat
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

Record = TypeVar("Record")

MAX_JSON_BYTES = 64 << 20
"""Larger JSON files are refused unless the caller sets another limit; kernels.json has about 1 MB."""

MAX_DEPTH = 100
"""JSON values that are nested more deeply are refused; manifests need eight levels."""

INTEGERS = -(2**63), 2**64 - 1
"""An integer whose field declares no range must fit in 64 bits, signed or unsigned."""


@dataclass(frozen=True)
class Range:
    """The inclusive range of a number, declared as `Annotated[int, Range(1, 256)]`."""

    low: float
    high: float
    words: str = ""

    def refusal(self, value: float) -> str | None:
        """Return the words for the expected range if the value is out of range, else None."""
        in_range = self.low <= value <= self.high
        return None if in_range else self.words or f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Form:
    """A regular expression that a whole string must match, and the words that describe it."""

    pattern: str
    words: str

    def refusal(self, value: str) -> str | None:
        """Return the words for the expected form if the string does not match it, else None."""
        return None if re.fullmatch(self.pattern, value) else self.words


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Return the value in a JSON file.

    Only a regular file of at most `limit` bytes is read, so that a pipe cannot block and a device cannot fill
    the memory. Raises OSError if the file cannot be read and ValueError if it is too large, is not JSON, or
    is nested more deeply than MAX_DEPTH.
    """
    return parse_json(read_bytes(path, limit))


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; raises as `read_json` does."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # the name has a NUL character or cannot be encoded
        raise OSError(errno.EINVAL, f"not a possible file name ({error})") from error
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return data


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; ValueError if it is not JSON or nested more deeply than MAX_DEPTH."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _inside(value: Any) -> typing.Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def build(kind: type[Record], value: Any, where: str = "", *, strict: bool = False) -> Record:
    """Build `kind`, a dataclass of scalars, tuples, dicts, literals, unions and dataclasses, from JSON.

    Entries missing in the JSON take their defaults. Unknown entries are ignored, or refused if `strict` is
    set. Numbers must be in the `Range` of their field's annotation (without one: integers in INTEGERS, floats
    finite), and strings must match its `Form`. ValueError names the invalid entry by its path below `where`,
    its value and the expected values.
    """
    return _build(kind, value, where, strict)


def _build(kind: Any, value: Any, where: str, strict: bool) -> Any:
    origin: Any = typing.get_origin(kind) or kind
    args = typing.get_args(kind)
    if origin is Annotated:
        built = _build(args[0], value, where, strict)
        for rule in args[1:]:
            if built is not None and (words := rule.refusal(built)):
                raise ValueError(f"{where} is {_shown(value)}, expected {words}".lstrip())
        return built
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _record(kind, value, where, strict)
    if origin in (typing.Union, types.UnionType):
        arm = next((a for a in args if _takes(a, value)), args[0])
        return None if arm is type(None) else _build(arm, value, where, strict)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_build(k, v, _below(where, i), strict) for i, (k, v) in pairs)
    if origin is dict and isinstance(value, dict):
        named = {_build(args[0], k, f"the name {_below(where, k)}", strict): v for k, v in value.items()}
        return {k: _build(args[1], v, _below(where, k), strict) for k, v in named.items()}
    if origin is Any or (origin is Literal and any(type(v) is type(value) and v == value for v in args)):
        return value
    if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool) and _finite(value):
        return float(value)
    if origin is int and type(value) is int and not INTEGERS[0] <= value <= INTEGERS[1]:
        raise ValueError(f"{where} is {_shown(value)}, expected a number of at most 64 bits".lstrip())
    if isinstance(origin, type) and type(value) is origin and origin not in (tuple, dict, float):
        return value
    raise ValueError(f"{where} is {_shown(value)}, expected {_words(kind)}".lstrip())


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that is larger than the largest float
        return False


def _shown(value: Any) -> str:
    """Return a value as error messages show it, in at most 80 characters."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.80}"


def _record(kind: Any, value: dict[str, Any], where: str, strict: bool) -> Any:
    hints = _hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [_below(where, name) for name in required if name not in value]:
        raise ValueError(f"lacks {', '.join(missing)}")
    if strict and (unknown := [_below(where, str(name)) for name in value if name not in fields]):
        raise ValueError(f"unknown entries {', '.join(unknown)}, expected some of {', '.join(fields)}")
    given = {name: value[name] for name in fields if name in value}
    built = {k: _build(hints[k], v, _below(where, k), strict) for k, v in given.items()}
    try:
        return kind(**built)
    except ValueError as error:  # errors of the class itself
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _takes(kind: Any, value: Any) -> bool:
    """Return True if a JSON value can be meant for this arm of a union."""
    origin = typing.get_origin(kind) or kind
    if origin is Annotated:
        return _takes(typing.get_args(kind)[0], value)
    if dataclasses.is_dataclass(kind):  # of several classes, take the one whose family the value names
        return isinstance(value, dict) and value.get("family") == getattr(kind, "family", None)
    if origin is dict:
        return isinstance(value, dict)
    if origin is tuple:
        return isinstance(value, (list, tuple))
    return value in typing.get_args(kind) if origin is Literal else type(value) is origin


def _below(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _words(kind: Any) -> str:
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Annotated:
        return _words(args[0])
    if dataclasses.is_dataclass(kind) or origin is dict:
        return "an object"
    if origin is tuple:
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(arm) for arm in args)
    return "null" if origin is type(None) else getattr(origin, "__name__", str(origin))
