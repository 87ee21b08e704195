"""The bundled checkpoints and engines: they belong together, stay small, and do what the README shows."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import metrics
import numpy as np
import pairs
import pytest
from PIL import Image

from moesr.export.package import checkpoint_directory
from moesr.runtime import Upscaler
from moesr.runtime.engines import DEMO_ENGINES, engine_directory
from moesr.runtime.resize import imresize
from moesr.training.checkpoint import load_checkpoint
from moesr.training.recipe import load_recipe

LR_PATH = Path(__file__).parent / "assets" / "chelsea_lr.png"
LARGEST_BYTES = 25_000_000
STEPS = 8  # enough to tell a working engine from a broken one
DEGRADED = {"demo-x4": "x4-blind", "demo-x8": "x8-bicubic"}
BETTER = {
    "demo-x4": ("psnr", "spectrum", "high_spectrum"),
    "demo-x8": ("psnr", "spectrum", "high_spectrum", "gms"),
}


@pytest.fixture(scope="module")
def hr() -> np.ndarray:
    data = pytest.importorskip("skimage.data")
    return data.chelsea()[:296, :448]


@pytest.mark.parametrize("name", DEMO_ENGINES)
@pytest.mark.parametrize("directory", [engine_directory, checkpoint_directory], ids=["engine", "checkpoint"])
def test_is_small(directory, name):
    assert sum(path.stat().st_size for path in directory(Path(name)).iterdir()) <= LARGEST_BYTES


@pytest.mark.parametrize("name", DEMO_ENGINES)
def test_checkpoint_is_what_its_recipe_trains(name):
    config, recipe = load_checkpoint(checkpoint_directory(Path(name))).config, load_recipe(name).model
    assert recipe.unet is not None
    merged = dataclasses.replace(recipe.unet, space_experts=1)
    assert config == dataclasses.replace(recipe, unet=merged)


@pytest.mark.parametrize("name", DEMO_ENGINES)
def test_engine_is_made_from_the_checkpoint(name):
    with Upscaler(name) as up:
        assert up.manifest.checkpoint_sha256 == load_checkpoint(checkpoint_directory(Path(name))).sha256()
        assert f"-x{up.manifest.scale}" in name


def test_lr_is_the_photograph_made_smaller(hr):
    np.testing.assert_array_equal(np.asarray(Image.open(LR_PATH)), pairs.degrade(hr, "x4-bicubic", "chelsea"))


@pytest.mark.parametrize("name", DEMO_ENGINES)
def test_beats_bicubic(name):
    """In the mean over the photographs kept out of training, which vary more than the methods do."""
    pytest.importorskip("skimage.data")
    got, plain = [], []
    with Upscaler(name) as up:
        for photograph, hr in pairs.load_originals("demo").items():
            lr, scale = pairs.degrade(hr, DEGRADED[name], photograph), up.manifest.scale
            got.append(metrics.scores(up(lr, steps=STEPS), hr, scale))
            plain.append(metrics.scores(imresize(lr, *hr.shape[:2]), hr, scale))
    for measure in BETTER[name]:
        assert sum(s[measure] for s in got) > sum(s[measure] for s in plain), measure


def test_command_without_engine(tmp_path, hr):
    """What `make demo` does, in an environment without torch."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'triton')))"
    code = f"{blocked}; from moesr.runtime.cli import main; sys.exit(main())"
    target = tmp_path / "sr.png"
    command = [sys.executable, "-c", code, str(LR_PATH), "-o", str(target), "--steps", str(STEPS), "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert Image.open(target).size == (hr.shape[1], hr.shape[0])
