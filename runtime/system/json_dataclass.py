"""Frozen dataclasses from JSON values: one reader for manifests, checkpoints and recipes."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

Record = TypeVar("Record")


def build(kind: type[Record], value: Any, where: str = "", *, strict: bool = False) -> Record:
    """Build `kind`, a dataclass of scalars, tuples, dicts, literals, unions and dataclasses, from JSON.

    Entries that the JSON lacks take their defaults. Entries that `kind` does not know are passed over, or
    refused where `strict`. ValueError names the entry at fault by its path below `where`, what was got and
    what was expected.
    """
    return _build(kind, value, where, strict)


def _build(kind: Any, value: Any, where: str, strict: bool) -> Any:
    origin: Any = typing.get_origin(kind) or kind
    args = typing.get_args(kind)
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
        return {k: _build(args[1], v, _below(where, k), strict) for k, v in value.items()}
    if origin is Any or (origin is Literal and value in args):
        return value
    if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(origin, type) and type(value) is origin and origin not in (tuple, dict):
        return value
    raise ValueError(f"{where} is {value!r:.80}, expected {_words(kind)}".lstrip())


def _record(kind: Any, value: dict[str, Any], where: str, strict: bool) -> Any:
    hints = typing.get_type_hints(kind)
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
    except ValueError as error:  # what the class itself refuses
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _takes(kind: Any, value: Any) -> bool:
    """Whether a JSON value may be meant for this arm of a union."""
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(kind):  # of several, the one of the family that the value names
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
    if dataclasses.is_dataclass(kind) or origin is dict:
        return "an object"
    if origin is tuple:
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(arm) for arm in args)
    return "null" if origin is type(None) else getattr(origin, "__name__", str(origin))
