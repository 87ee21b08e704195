"""benchmarks/baseline.py: equal lengths of training, and the whole comparison with tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import baseline
import pytest
import tiny_training as tiny
from PIL import Image
from skimage import data

from moesr.training.recipe import load_recipe
from moesr.training.stages.common import plain

PLAIN = {"fusion_level": None, "refinement": "none"}


def test_both_presets_train_equally_on_one_first_stage():
    ldm, moe = (load_recipe(baseline.PRESETS[name]) for name in (baseline.LDM, baseline.MOE))
    assert plain(ldm.model.decoder) == plain(moe.first_stage) and not ldm.model.decoder.fusion_levels
    assert ldm.model.decoder.refinement == "none"
    assert moe.model.unet == dataclasses.replace(ldm.model.unet, space_experts=4)
    assert ldm.model.expert_ranges == ((0, 1000),)
    for entry in ("schedule", "sampler", "steps", "prediction", "scale"):
        assert getattr(ldm.model, entry) == getattr(moe.model, entry)
    usual = baseline.usual_lengths()
    assert ldm.experts.steps == usual.all_experts and ldm.experts.base_steps == 0
    assert ldm.decoder.steps == moe.decoder.steps == usual.decoder
    assert ldm.autoencoder == moe.autoencoder and ldm.augmentation == moe.augmentation
    for stage in ("experts", "decoder"):
        for entry in ("batch", "accumulate", "patch_px", "learning_rate", "ema_decay", "precision"):
            assert getattr(getattr(ldm, stage), entry) == getattr(getattr(moe, stage), entry)


def test_short_training_stays_equal():
    short = baseline.Lengths(base=100, expert=20, decoder=30, latents=64)
    ldm, moe = (load_recipe(baseline.PRESETS[name], short.changes(name)) for name in baseline.PRESETS)
    assert (moe.experts.base_steps, moe.experts.steps, moe.experts.warmup_steps) == (100, 20, 10)
    assert (ldm.experts.base_steps, ldm.experts.steps, ldm.experts.warmup_steps) == (0, 180, 18)
    for recipe in (ldm, moe):
        assert (recipe.decoder.steps, recipe.decoder.warmup_steps, recipe.decoder.latents) == (30, 3, 64)
        assert recipe.experts.latent_pool == 64


def test_usual_lengths_are_those_of_the_presets():
    usual = baseline.usual_lengths()
    for name, preset in baseline.PRESETS.items():
        assert load_recipe(preset, usual.changes(name)) == load_recipe(preset)


def test_models_of_different_first_stages_are_not_compared(tmp_path, capsys):
    for name, codes in (("one", 16), ("other", 8)):
        tiny.first_stage(tmp_path / name, tiny.recipe(model={"decoder": {"codebook_size": codes}}))
    given = ["--ldm", str(tmp_path / "one"), "--moe", str(tmp_path / "other"), "-o", str(tmp_path / "out")]
    assert baseline.main(given) == 2
    assert "trained on different first stages" in capsys.readouterr().err


def test_training_without_a_first_stage_is_refused(tmp_path, capsys):
    assert baseline.main(["--data", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "LDM is to be trained: give --first-stage and --data" in capsys.readouterr().err


@pytest.mark.slow
def test_tiny_models_are_trained_and_compared(tmp_path: Path, monkeypatch):
    """Then the finished models are compared again without training."""
    model = {"unet": {"space_experts": 0}, "decoder": PLAIN, "expert_ranges": [[0, 1000]]}
    ldm = tiny.write_recipe(tmp_path / "ldm.json", model=model, decoder={"trainable": "decoder"})
    moe = tiny.write_recipe(tmp_path / "moe.json")
    monkeypatch.setattr(baseline, "PRESETS", {baseline.LDM: str(ldm), baseline.MOE: str(moe)})
    first, out = tiny.first_stage(tmp_path / "first", tiny.recipe()).directory, tmp_path / "out"
    photos = tiny.photographs(tmp_path / "photos")
    (tmp_path / "hr").mkdir()
    Image.fromarray(data.chelsea()[:64, :64]).save(tmp_path / "hr" / "cat.png")
    shown = ["--hr", str(tmp_path / "hr"), "--tile", "32", "--threads", "1", "-o", str(out)]
    short = ["--base-steps", "2", "--expert-steps", "1", "--decoder-steps", "2", "--latents", "4"]
    assert baseline.main(["--first-stage", str(first), "--data", str(photos), *short, *shown]) == 0
    page = (out / "baseline.md").read_text()
    for row in ("Bicubic", baseline.FIRST_DECODER, "LDM", "MoE-SR, fidelity 1", "MoE-SR, fidelity 0"):
        assert page.count(f"| {row} |") == 2 + (row in (baseline.FIRST_DECODER, "LDM"))
    assert "**This training is short: the experts had 4 of" in page and "2 x 1 for MoE-SR" in page
    models = [str(out / name / "decoder/checkpoint") for name in ("ldm", "moe-sr")]
    assert baseline.main(["--ldm", models[0], "--moe", models[1], *shown]) == 0
    again = (out / "baseline.md").read_text()
    assert "Trained before: LDM " in again and "This training is short" not in again
