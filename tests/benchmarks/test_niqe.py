"""NIQE: its parts follow their definitions, and one image has the same score as in BasicSR and MATLAB."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from benchlib import niqe
from PIL import Image
from skimage import data

from moesr.runtime.errors import InputError
from moesr.runtime.images.resize import imresize

BABOON = 5.7296  # score of Set14's first image by MATLAB and by BasicSR


def pristine(**entries: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays as in BasicSR's file, with arbitrary values."""
    line = np.exp(-0.5 * (np.arange(-3, 4) / (7 / 6)) ** 2)
    window = np.outer(line, line)
    arrays = {
        "mu_pris_param": np.zeros((1, 36)),
        "cov_pris_param": np.eye(36),
        "gaussian_window": window / window.sum(),
    }
    return arrays | entries


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> niqe.Pristine:
    path = tmp_path_factory.mktemp("niqe") / "model.npz"
    np.savez(path, **pristine())
    return niqe.load(path)


def test_score_of_a_known_image():
    """This test runs only if MOESR_NIQE and MOESR_SET14 name BasicSR's file and the folder of Set14."""
    places = [os.environ.get(name, "") for name in ("MOESR_NIQE", "MOESR_SET14")]
    if not all(places):
        pytest.skip("set MOESR_NIQE and MOESR_SET14 to niqe_pris_params.npz and the folder of Set14")
    image = np.asarray(Image.open(Path(places[1]) / "1.png").convert("RGB"))
    assert niqe.niqe(image, niqe.load(Path(places[0]))) == pytest.approx(BABOON, abs=2e-4)


def test_halving_equals_imresize():
    plane = data.camera()[:96, :128].astype(np.float32)
    halved = niqe.halved(plane)
    assert halved.shape == (48, 64)
    rounded = imresize(plane.astype(np.uint8), 48, 64)
    # the reference is rounded after each axis
    np.testing.assert_allclose(halved.clip(0, 255), rounded, atol=1.01)


@pytest.mark.parametrize(("name", "shape"), [("normal", 2.0), ("laplace", 1.0)])
def test_shape_of_a_generalised_gaussian_is_estimated(name, shape):
    values = getattr(np.random.default_rng(0), name)(size=200_000)
    found, left, right = niqe.asymmetric_gaussian(values)
    assert found == pytest.approx(shape, abs=0.05)
    assert left == pytest.approx(right, rel=0.05)


def test_scales_of_an_asymmetric_distribution_are_estimated():
    values = np.random.default_rng(0).normal(size=100_000)
    values[values > 0] *= 3.0
    _, left, right = niqe.asymmetric_gaussian(values)
    assert right / left == pytest.approx(3.0, rel=0.05)


def test_degraded_photographs_have_a_larger_distance(model):
    """The model is fitted to features of the undegraded photograph; noise and blur increase the distance."""
    photo = data.astronaut()
    plane = np.round(niqe.luma(photo)).astype(np.float32)[:480, :480]
    sizes = ((plane, 96), (niqe.halved(plane), 48))
    each = [
        [niqe.block_features(b) for b in niqe.blocks(niqe.normalised(p, model.window), side)]
        for p, side in sizes
    ]
    features = np.concatenate(each, axis=1)
    whole = features[~np.isnan(features).any(axis=1)]
    own = niqe.Pristine(whole.mean(axis=0), np.cov(whole, rowvar=False), model.window)
    noisy = photo + np.random.default_rng(0).normal(scale=20.0, size=photo.shape)
    soft = imresize(imresize(photo, 128, 128), 512, 512)
    values = [niqe.niqe(np.clip(i, 0, 255).astype(np.uint8), own) for i in (photo, noisy, soft)]
    assert values[0] < 0.5 < min(values[1:])


def test_images_with_fewer_than_two_blocks_have_no_score(model):
    assert np.isnan(niqe.niqe(np.zeros((100, 180, 3), np.uint8), model))


@pytest.mark.parametrize(
    "content",
    [b"not an archive", pristine(mu_pris_param=np.zeros(36)), {"other": np.zeros(3)}],
    ids=["text", "shape", "entries"],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(InputError, match=r"model\.npz: "):
        niqe.load(path)
