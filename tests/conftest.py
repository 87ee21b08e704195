"""Shared fixtures: the published reference data, the weights made from key names, and small photographs."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

# Triton reads this when it is imported; kernels then run on a CPU. 0 tests them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest

REPO = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("MOESR_REFERENCE", REPO.parent / "shared" / "reference"))


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Directory of the published facts (key lists, weight filler, goldens)."""
    if not REFERENCE.is_dir():
        pytest.skip(f"reference data not found at {REFERENCE}; set MOESR_REFERENCE to its directory")
    return REFERENCE


@pytest.fixture(scope="session")
def golden(reference_dir: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """Load one golden file by stem: `golden("unet_w32")["eps"]`."""

    def load(stem: str) -> dict[str, np.ndarray]:
        with np.load(reference_dir / "golden" / f"{stem}.npz") as data:
            return dict(data)

    return load


@pytest.fixture(scope="session")
def published_weights(reference_dir: Path) -> Callable[[str, str], dict[str, np.ndarray]]:
    """Weights of a published network, made from its key list: `published_weights("unet_w32", "dev")`."""
    spec = importlib.util.spec_from_file_location("reference_fill", reference_dir / "fill.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = json.loads((reference_dir / "checkpoint_keys.json").read_text())

    def make(network: str, salt: str) -> dict[str, np.ndarray]:
        return module.fill_all({k: tuple(s) for k, s in shapes[network].items()}, salt)

    return make


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||, in float64."""
    got64, want64 = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got64 - want64) / np.linalg.norm(want64))
