"""The code of the two worked examples in CONTRIBUTING.md works."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import build_engine

import moesr.kernels
import moesr.runtime.backends
from moesr.runtime import Upscaler
from moesr.runtime.backends.selection import BACKENDS

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
STEP = re.compile(r"\*\*\d\. `([\w/]+\.py)`\*\*.*?\n\n```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files of both examples as modules of their packages."""
    for name, text in STEP.findall(PAGE.read_text(encoding="utf-8")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        compile(text, name, "exec")
    before = set(sys.modules)
    for package, folder in ((moesr.kernels, "kernels"), (moesr.runtime.backends, "runtime/backends")):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / folder)])
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_operator_of_the_example_equals_its_reference(example: Path):
    pytest.importorskip("triton")
    from moesr.kernels.check import errors
    from moesr.kernels.interpreter import interpreted

    op = importlib.import_module("moesr.kernels.channel_gain.op").OP
    device = torch.device("cpu" if interpreted() else "cuda")
    for case in op.cases:
        assert errors(op, case, device)["y"] <= case.tolerance
    operator = importlib.import_module("moesr.kernels.channel_gain.operator").channel_gain
    torch.library.opcheck(operator, (torch.randn(2, 3, 7), torch.randn(3)))
    assert all(op.cost(case.shape, case.dtype).bytes > 0 for case in op.deployed)


def test_backend_of_the_example_gives_the_same_images(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(BACKENDS, "plain", "moesr.runtime.backends.plain")
    engine = build_engine(tmp_path / "engine")
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    results = []
    for backend in ("plain", "onnxruntime"):
        with Upscaler(engine, backend=backend, max_batch=2) as upscaler:
            results.append(upscaler(image))
    assert np.abs(results[0].astype(int) - results[1]).max() <= 1
