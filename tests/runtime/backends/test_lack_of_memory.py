"""Whatever a library says, paths never make its errors a lack of memory, and allocators always do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moesr.runtime.backends import ort, ov
from moesr.runtime.cli import preclean
from moesr.runtime.errors import EngineError, MemoryLimitError

PATH = Path("/data/allocated engines/failed to allocate memory.onnx")
SOURCES = [ort._explain, ov._explain, preclean._explain]


@pytest.mark.parametrize("explain", SOURCES, ids=lambda function: function.__module__.rpartition(".")[2])
def test_errors_of_graphs(explain: Callable[[Path, Exception], Exception]):
    for text in (
        f"Load model from {PATH} failed: Protobuf parsing failed",
        "the node alloc_3 has no input",
        f"{PATH.name}: reallocated tensors differ",
    ):
        error = explain(PATH, RuntimeError(text))
        assert isinstance(error, EngineError) and not isinstance(error, MemoryLimitError)
        assert str(PATH) in str(error)


@pytest.mark.parametrize("explain", SOURCES, ids=lambda function: function.__module__.rpartition(".")[2])
def test_errors_of_allocators(explain: Callable[[Path, Exception], Exception]):
    for text in ("std::bad_alloc", "Exception from src/x.cpp:3:\ncan't alloc", "Failed to allocate memory"):
        assert isinstance(explain(PATH, RuntimeError(f"{PATH}: {text}")), MemoryLimitError)
