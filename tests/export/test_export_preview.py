"""The map from latents to colors that an export fits to a run of its engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engines import build_engine
from graphs import write_checkpoint

from moesr.export import cli, preview
from moesr.runtime import Upscaler
from moesr.runtime.engine.manifest_file import read_manifest


@pytest.mark.parametrize("fidelity", [0.0, 1.0])
def test_the_map_follows_what_the_decoder_makes_of_a_latent(tmp_path: Path, fidelity: float):
    """The decoder of the tiny engine gives fidelity * lr + 0.05 * latent.

    At fidelity 0 the latent explains the whole result. At 1 the LR image explains nearly all of it, and the
    latent what is left.
    """
    engine = build_engine(tmp_path / "engine", fidelity=fidelity)
    found = preview.preview_map(engine, read_manifest(engine))
    assert found is not None and found.adds_lr == (fidelity == 1.0)
    np.testing.assert_allclose(found.weights, 0.05 * np.eye(3), atol=0.02)
    np.testing.assert_allclose(found.bias, 0.0, atol=0.02)


def test_an_exported_engine_has_a_map(tmp_path: Path):
    checkpoint, engine = write_checkpoint(tmp_path / "tiny"), tmp_path / "engine"
    assert cli.main([str(checkpoint), "-o", str(engine), "--tile", "32", "--quiet"]) == 0
    assert read_manifest(engine).preview is not None
    shown: list[np.ndarray | None] = []
    with Upscaler(engine, backend="onnxruntime", threads=1) as up:
        up(np.zeros((8, 8, 3), np.uint8), steps=1, on_step=lambda step: shown.append(step.preview()))
    assert shown[0] is not None and shown[0].shape == (8, 8, 3)


def test_an_engine_that_cannot_run_here_gets_no_map(tmp_path: Path):
    engine = build_engine(tmp_path / "engine", nan_expert=0)
    assert preview.preview_map(engine, read_manifest(engine)) is None


def test_the_test_image_fits_any_tile():
    for side in (1, 2, 7, 64):
        image = preview.test_image(side)
        assert image.shape == (side, side, 3) and image.dtype == np.uint8
    assert image.std() > 30
    assert np.array_equal(image, preview.test_image(64))
