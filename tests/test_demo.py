"""The bundled checkpoint and engine: they belong together, stay small, and do what the README shows."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import metrics
import numpy as np
import pytest
from PIL import Image

from moesr.export.package import demo_checkpoint
from moesr.runtime import Upscaler
from moesr.runtime.resize import imresize
from moesr.runtime.upscaler import bundled_engine
from moesr.training.checkpoint import load_checkpoint
from moesr.training.recipe import load_recipe

LR_PATH = Path(__file__).parent / "assets" / "chelsea_lr.png"
LARGEST_BYTES = 25_000_000
STEPS = 8  # enough to tell a working engine from a broken one


@pytest.fixture(scope="module")
def lr() -> np.ndarray:
    return np.asarray(Image.open(LR_PATH))


@pytest.fixture(scope="module")
def hr() -> np.ndarray:
    data = pytest.importorskip("skimage.data")
    return data.chelsea()[:296, :448]


@pytest.mark.parametrize("directory", [bundled_engine, demo_checkpoint], ids=["engine", "checkpoint"])
def test_is_small(directory):
    assert sum(path.stat().st_size for path in directory().iterdir()) <= LARGEST_BYTES


def test_checkpoint_is_what_its_recipe_trains():
    config, recipe = load_checkpoint(demo_checkpoint()).config, load_recipe("demo-x4-colour").model
    assert recipe.unet is not None
    merged = dataclasses.replace(recipe.unet, space_experts=1)
    assert config == dataclasses.replace(recipe, unet=merged)


def test_engine_is_made_from_the_checkpoint():
    with Upscaler() as up:
        assert up.manifest.checkpoint_sha256 == load_checkpoint(demo_checkpoint()).sha256()
        assert up.manifest.scale == 4


def test_lr_is_the_photograph_made_smaller(lr, hr):
    np.testing.assert_array_equal(lr, imresize(hr, *lr.shape[:2]))


def test_command_without_engine(tmp_path, lr, hr):
    """What `make demo` does, in an environment without torch."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'triton')))"
    code = f"{blocked}; from moesr.runtime.cli import main; sys.exit(main())"
    target = tmp_path / "sr.png"
    command = [sys.executable, "-c", code, str(LR_PATH), "-o", str(target), "--steps", str(STEPS), "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    sr = np.asarray(Image.open(target))
    assert sr.shape == hr.shape
    bicubic = imresize(lr, *hr.shape[:2])
    wanted, got, plain = (metrics.measured_luma(image, 4) for image in (hr, sr, bicubic))
    assert metrics.psnr(got, wanted) > metrics.psnr(plain, wanted) - 1.5
    assert _detail(got) > 1.5 * _detail(plain), "the result is as smooth as bicubic"


def _detail(luma: np.ndarray) -> float:
    """Mean squared second difference: what enlarging without new detail leaves small."""
    return float(np.mean(np.diff(luma, 2, axis=0) ** 2) + np.mean(np.diff(luma, 2, axis=1) ** 2))
