"""Training of the refinement network alone: the autoencoder stays as it is, and the losses fall."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_training as tiny
import torch
from autoencoders import TINY, tiny_checkpoint
from PIL import Image

from moesr.runtime.errors import UsageError
from moesr.training.checkpoint import load_checkpoint
from moesr.training.cli import main
from moesr.training.config import VaeConfig
from moesr.training.data import demo_photos
from moesr.training.recipe import Recipe, load_recipe
from moesr.training.stages import refinement

PLAIN = {"refinement": "none"}


def recipe(**changes) -> Recipe:
    model = VaeConfig(name="tiny-kl", decoder=dataclasses.replace(TINY, filter_blocks=2))
    stage = tiny.recipe(decoder={"steps": 3, "adversarial_weight": 0.5, **changes}).decoder
    return Recipe(model=model, decoder=stage)


def write(made: Recipe, path: Path) -> Path:
    values = {"model": made.model.to_dict(), "decoder": dataclasses.asdict(made.decoder)}
    values["decoder"] = {"steps": made.decoder.steps, "batch": 2, "accumulate": 1, "patch_px": tiny.PATCH}
    values["decoder"] |= {"learning_rate": 1e-3, "adversarial_weight": 0.5}
    path.write_text(json.dumps(values))
    return path


def test_only_the_refinement_network_changes(tmp_path, capsys):
    start = tiny_checkpoint(tmp_path / "start", refinement="none")
    config, photos = write(recipe(), tmp_path / "recipe.json"), tiny.photographs(tmp_path / "photos")
    command = [
        "refinement",
        "--config",
        config,
        "--data",
        photos,
        "--val",
        photos,
        "-o",
        tmp_path / "run",
        "--quiet",
    ]
    assert main([str(word) for word in [*command, "--from", start.directory]]) == 0
    trained = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert trained.config == dataclasses.replace(recipe().model, latent_scale=0.18215)
    before, after = start.decoder().state_dict(), trained.decoder().state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    initial = refinement.prepare(recipe(), start, tiny.run(tmp_path)).network.state_dict()
    moved = [key for key in after if not torch.equal(after[key], initial[key])]
    assert moved and all(key.startswith("decoder.unet_1.") for key in moved)
    lines = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert {"l1", "ffl", "adv", "critic"} <= lines[0].keys()
    assert main([str(word) for word in command]) == 2  # without --from
    assert "moesr-import --decoder" in capsys.readouterr().err


def test_new_refinement_network_changes_little(tmp_path):
    start = tiny_checkpoint(tmp_path / "start", refinement="none")
    network = refinement.prepare(recipe(), start, tiny.run(tmp_path)).network.eval()
    z = torch.randn(1, 4, 4, 4)
    with torch.inference_mode():
        plain, refined = (network.decode(z, refined=value) for value in (False, True))
    assert (refined - plain).norm() < 0.5 * plain.norm()


def test_other_checkpoints_are_refused(tmp_path):
    decoder_alone = tiny_checkpoint(tmp_path / "alone", encoder=False, refinement="none")
    with pytest.raises(UsageError, match="has no encoder"):
        refinement.prepare(recipe(), decoder_alone, tiny.run(tmp_path))
    whole = tiny_checkpoint(tmp_path / "whole")
    with pytest.raises(UsageError, match="expected"):
        refinement.prepare(recipe(), whole, tiny.run(tmp_path), whole)
    with pytest.raises(UsageError, match="refinement trains"):
        refinement.prepare(tiny.recipe(), whole, tiny.run(tmp_path))


@pytest.mark.slow
def test_losses_fall_on_the_demo_photographs(tmp_path):
    """A short run of both stages of the preset on photographs that come with Python packages."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, pixels in list(demo_photos.photographs("train").items())[:6]:
        Image.fromarray(pixels).save(folder / f"{name}.png")
    short = [
        "--set",
        "autoencoder.steps=150",
        "--set",
        "decoder.steps=80",
        "--set",
        "decoder.adversarial_from=40",
    ]
    short += ["--set", "autoencoder.batch=4", "--set", "decoder.batch=2"]
    command = ["all", "--config", "demo-kl-f8", "--data", str(folder), "-o", str(tmp_path / "run"), "--quiet"]
    assert main([*command, *short]) == 0
    for stage in ("autoencoder", "refinement"):
        losses = [
            json.loads(line) for line in (tmp_path / "run" / stage / "losses.jsonl").read_text().splitlines()
        ]
        for name in ("l1", "ffl"):
            values = [line[name] for line in losses if "loss" in line]
            tenth = max(len(values) // 5, 1)
            assert sum(values[-tenth:]) < sum(values[:tenth]), (stage, name)
    assert (
        load_checkpoint(tmp_path / "run" / "refinement" / "checkpoint").config.decoder
        == load_recipe("demo-kl-f8").model.decoder
    )
