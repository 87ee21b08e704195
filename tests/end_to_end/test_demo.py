"""The bundled checkpoints and engines fit one another, are small, and work as the README shows."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchlib import image_pairs, metrics
from PIL import Image

from moesr.export import cli
from moesr.export.package import checkpoint_directory
from moesr.runtime import Upscaler
from moesr.runtime.engine.locate import DEMO_ENGINES, engine_directory
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.images.resize import imresize
from moesr.training.checkpoint import load_checkpoint
from moesr.training.recipe import load_recipe

LR_PATH = Path(__file__).parents[1] / "assets" / "chelsea_lr.png"
LARGEST_BYTES = 16 << 20
STEPS = 8  # with this number, a broken engine already fails the tests
LEAST = {
    ("demo-x4", "x4-bicubic"): {"psnr": 0.1, "ssim": 0.0, "spectrum": 0.05, "high_spectrum": 0.05},
    ("demo-x4", "x4-blind"): {"psnr": 0.0, "ssim": 0.0, "spectrum": 0.02, "high_spectrum": 0.02},
    ("demo-x8", "x8-bicubic"): {"psnr": 0.3, "ssim": 0.0, "spectrum": 0.01, "gms": 0.0},
}
"""The smallest gain of the engines over bicubic, by degradation."""


@pytest.fixture(scope="module")
def hr() -> np.ndarray:
    data = pytest.importorskip("skimage.data")
    return data.chelsea()[:296, :448]


@pytest.mark.parametrize("name", DEMO_ENGINES)
@pytest.mark.parametrize("directory", [engine_directory, checkpoint_directory], ids=["engine", "checkpoint"])
def test_bundled_files_are_small(directory, name):
    assert sum(path.stat().st_size for path in directory(Path(name)).iterdir()) <= LARGEST_BYTES


@pytest.mark.parametrize("name", DEMO_ENGINES)
def test_configuration_of_the_checkpoint_equals_its_recipe(name):
    config, recipe = load_checkpoint(checkpoint_directory(Path(name))).config, load_recipe(name).model
    assert recipe.unet is not None
    merged = dataclasses.replace(recipe.unet, space_experts=1)
    assert config == dataclasses.replace(recipe, unet=merged)


@pytest.mark.parametrize("name", DEMO_ENGINES)
def test_engine_was_exported_from_the_checkpoint(name):
    with Upscaler(name) as up:
        assert up.manifest.checkpoint_sha256 == load_checkpoint(checkpoint_directory(Path(name))).sha256()
        assert f"-x{up.manifest.scale}" in name


@pytest.mark.parametrize(
    ("name", "precision", "target"),
    [
        ("demo-x4", "fp16", "both"),
        ("demo-x8", "bf16", "gpu"),
        pytest.param("demo-x4", "bf16", "gpu", marks=pytest.mark.slow),
        pytest.param("demo-x8", "fp16", "both", marks=pytest.mark.slow),
    ],
)
def test_checkpoint_exports_in_half_precision(name, precision, target, tmp_path):
    flags = f"--{precision}", "--target", target, "--tile", "64", "--quiet"
    assert cli.main([name, *flags, "-o", str(tmp_path / "engine")]) == 0
    for graph in read_manifest(tmp_path / "engine").graphs.values():
        half = graph.arrangement("gpu")
        assert half.precision == precision and half.parity
        assert half.parity.relative_l2 < {"fp16": 3e-4, "bf16": 1e-2}[precision]


def test_demo_lr_image_is_the_reduced_photograph(hr):
    np.testing.assert_array_equal(
        np.asarray(Image.open(LR_PATH)), image_pairs.degrade(hr, "x4-bicubic", "chelsea")
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*case, marks=pytest.mark.slow if case[1] == "x4-blind" else ()) for case in LEAST],
)
def test_engines_beat_bicubic(name, kind):
    """The mean over all held-out photographs is compared, since single photographs vary more than methods."""
    pytest.importorskip("skimage.data")
    better = dict.fromkeys(metrics.COLUMNS, 0.0)
    with Upscaler(name) as up:
        originals = image_pairs.load_originals("demo")
        for photograph, hr in originals.items():
            lr, scale = image_pairs.degrade(hr, kind, photograph), up.manifest.scale
            got = metrics.scores(up(lr, steps=STEPS), hr, scale)
            plain = metrics.scores(imresize(lr, *hr.shape[:2]), hr, scale)
            for measure in better:
                better[measure] += (got[measure] - plain[measure]) / len(originals)
    least = LEAST[name, kind]
    short = {measure: better[measure] for measure in least if better[measure] <= least[measure]}
    assert not short


def test_commands_of_make_demo_run_without_torch(tmp_path, hr):
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'triton')))"
    code = f"{blocked}; from moesr.runtime.cli.run import main; sys.exit(main())"
    target = tmp_path / "sr.png"
    command = [sys.executable, "-c", code, str(LR_PATH), "-o", str(target), "--steps", str(STEPS), "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert Image.open(target).size == (hr.shape[1], hr.shape[0])


@pytest.mark.parametrize("options", [{"max_batch": 4}, {"threads": 1}], ids=["batch", "threads"])
def test_batches_and_threads_change_only_rounding(options):
    """A backend's kernels may sum in another order, which changes a few values by at most one level."""
    lr = np.asarray(Image.open(LR_PATH).convert("RGB"))[:60]  # the crop needs several tiles
    with Upscaler("demo-x4", max_batch=1, threads=2) as up:
        want = up(lr, steps=STEPS)
    with Upscaler("demo-x4", **({"max_batch": 1, "threads": 2} | options)) as up:
        got = up(lr, steps=STEPS)
    difference = np.abs(got.astype(int) - want)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 2e-3


MEMORY = """
import gc, os
import numpy as np
from moesr.runtime import Upscaler

def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

import onnxruntime
before = resident()
up = Upscaler(backend="onnxruntime")
up(np.zeros((64, 64, 3), np.uint8), steps=4)
working = resident()
up.close()
print((resident() - before) / (working - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_releases_memory():
    """The arena that all sessions share is released too."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.5


REPEATED = """
from pathlib import Path
import numpy as np
from moesr.runtime.engine.locate import engine_directory
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends import ort

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

directory = engine_directory(Path("demo-x4"))
graph = read_manifest(directory).graphs["decoder"]
session = ort.open_session(directory / graph.file, graph.boundary, SessionOptions("cpu"))
specs = (*graph.inputs, *graph.outputs)
session.bind({spec.name: np.zeros(spec.shape(1), np.float32) for spec in specs}, 1)
before, after = resident(), []
for _ in range(3):
    session.enqueue(1)
    after.append(resident() - before)
print(after[-1] / after[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_repeated_runs_do_not_need_more_memory():
    result = subprocess.run([sys.executable, "-c", REPEATED], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.2
