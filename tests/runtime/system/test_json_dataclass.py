"""Damaged or hostile JSON is refused with a ValueError or OSError and no other exception."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from moesr.runtime.system import user_cache
from moesr.runtime.system.json_dataclass import Form, Range, build, read_json


@dataclass(frozen=True)
class Values:
    count: Annotated[int, Range(1, 10)] = 1
    free: int = 0
    ratio: float = 0.0
    share: Annotated[float, Range(0, 1)] | None = None
    name: Annotated[str, Form("[a-z]+", "lower-case letters")] = "a"
    kind: Literal[1, "x"] = 1
    sizes: tuple[Annotated[int, Range(1, 8)] | str, ...] = ()


GOOD: list[dict[str, Any]] = [
    {"count": 10, "ratio": 3, "share": 1, "name": "abc", "kind": "x", "sizes": [8, "B"]},
    {"share": None, "free": 2**64 - 1},
]
BAD: dict[str, tuple[str, Any, str]] = {
    "below": ("count", 0, "count is 0, expected a number from 1 to 10"),
    "above": ("count", 11, "count is 11"),
    "400 digits": ("count", 10**400, "count is a number of 1329 bits"),
    "5000 digits": ("free", 10**5000, "expected a number of at most 64 bits"),
    "too large for a float": ("ratio", 10**400, "ratio is a number of 1329 bits, expected float"),
    "NaN": ("ratio", float("nan"), "ratio is nan"),
    "infinity": ("ratio", float("inf"), "ratio is inf"),
    "a boolean": ("ratio", True, "ratio is True"),
    "a boolean for a literal": ("kind", True, "kind is True"),
    "in a union": ("share", 1.5, "share is 1.5, expected a number from 0 to 1"),
    "in a list": ("sizes", [3, 9], "sizes.1 is 9, expected a number from 1 to 8"),
    "another form": ("name", "a/b", "name is 'a/b', expected lower-case letters"),
    "a line's end": ("name", "a\n", "expected lower-case letters"),
}


@pytest.mark.parametrize("values", GOOD)
def test_values_in_range_are_accepted(values: dict[str, Any]):
    assert build(Values, values)


@pytest.mark.parametrize(("field", "value", "message"), BAD.values(), ids=BAD)
def test_values_out_of_range_are_named_in_the_error(field: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        build(Values, {field: value})


TEXTS = {
    "nested lists": "[" * 200_000,
    "nested objects": '{"a":' * 200_000,
    "closed nesting": "[" * 150 + "]" * 150,
    "an integer of 5000 digits": "1" * 5000,
    "not UTF-8": b"\xff\xfe{",
    "nothing": "",
    "too large": " " * (1 << 20) + "1",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_hostile_files_raise_value_error(tmp_path: Path, monkeypatch, text: str | bytes):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError):
        read_json(path, 1 << 20)
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path))
    assert user_cache.read("a.json") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "link to nothing", "circle"])
def test_only_regular_files_are_read(tmp_path: Path, monkeypatch, kind: str):
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "circle": path}.get(kind, tmp_path / "none"))
    with pytest.raises((OSError, ValueError)):
        read_json(path)
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path))
    assert user_cache.read("a.json") is None
