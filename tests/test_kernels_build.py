"""Kernels compiled ahead of time, without a GPU: resources, spills, and what kernels.json promises."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytest.importorskip("triton")

from moesr.kernels import build
from moesr.kernels.plan import ARCHITECTURES, SHARED_BYTES
from moesr.kernels.registry import OPS

REPO = Path(build.__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Everything for every architecture."""
    directory = tmp_path_factory.mktemp("kernels") / "built"
    return directory, build.build(directory, cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_resources_on_every_architecture(built, op):
    _, content = built
    kernels = {name: k for name, k in content["kernels"].items() if k["op"] == op.name}
    assert {t for k in kernels.values() for t in k["targets"]} >= {f"sm_{a}" for a in ARCHITECTURES}
    for name, kernel in kernels.items():
        for target, compiled in kernel["targets"].items():
            if target != "ptx":
                assert compiled["spill_bytes"] <= op.max_spill_bytes, (name, target)
                assert compiled["shared_bytes"] <= SHARED_BYTES[int(target[3:])], (name, target)
            assert not any(compiled["hidden"].values()), "the hidden pointers may be null"


@pytest.mark.parametrize("op", OPS)
def test_kernels_import_triton_alone(op):
    tree = ast.parse((REPO / "kernels" / op / "kernel.py").read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules <= {"triton", "triton.language", "__future__"}, "the source's hash must cover it all"
