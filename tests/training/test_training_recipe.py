"""Recipes: the presets follow the papers, changes are applied, and messages name mistakes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny_training as tiny
import torch

from moesr.runtime.errors import UsageError
from moesr.training.networks import Autoencoder, DenoisingUNet
from moesr.training.recipe import ExpertStage, Recipe, load_recipe, presets

ABLATIONS = sorted(name for name in presets() if name.startswith("ablation-"))


@pytest.mark.parametrize(("name", "scale", "degradation"), [("x4", 4, "blind"), ("x8", 8, "bicubic")])
def test_presets_have_the_settings_of_the_papers(name, scale, degradation):
    recipe = load_recipe(name)
    model, stage1, stage2 = recipe.model, recipe.experts, recipe.decoder
    assert (model.scale, recipe.degradation) == (scale, degradation)
    assert model.unet is not None
    assert (model.unet.width, model.unet.channel_mult, model.unet.head_channels) == (160, (1, 2, 2, 4), 32)
    assert model.expert_ranges == ((0, 250), (250, 500), (500, 750), (750, 1000))
    assert (stage1.steps, stage1.learning_rate, stage1.ema_decay) == (100_000, 5e-5, 0.9999)
    assert stage1.batch * stage1.accumulate * 8 == 144
    assert (stage2.steps, stage2.learning_rate, stage2.frequency_weight) == (50_000, 1e-4, 10.0)
    assert stage2.batch * stage2.accumulate * 8 == 32
    assert (stage2.latents, stage2.latent_steps) == (100_000, 200)
    assert stage2.lpips_weight > 0 and stage2.adversarial_weight == 0.8
    assert stage1.patch_px == stage2.patch_px == 512


def test_paper_presets_have_the_parameters_of_table_6():
    model = load_recipe("x4", ["model.unet.space_experts=1"]).model
    with torch.device("meta"):
        unet = sum(p.numel() for p in DenoisingUNet(model.unet).parameters())
        decoder = sum(p.numel() for p in Autoencoder(model.decoder).parameters())
    assert (4 * unet + decoder) / 1e6 == pytest.approx(605.30, abs=0.01)


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads(name):
    model = load_recipe(name).model
    assert (model.unet is None) == name.endswith(("-render", "kl-f8"))  # models without experts


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_presets_differ_only_in_their_ablation(name):
    demo, other = load_recipe("demo-x4"), load_recipe(name)
    full = demo if name.startswith("ablation-no") else load_recipe("ablation-decoder-aff-ffl")
    changed = {
        "ablation-no-sampling-moe": {"experts": 1},
        "ablation-no-space-moe": {"space": 0},
        "ablation-decoder-baseline": {"fusion": None, "refinement": "none", "ffl": 0.0},
        "ablation-decoder-aff": {"ffl": 0.0},
        "ablation-decoder-aff-ffl": {"fusion": 1, "refinement": "aff", "ffl": 10.0},
        "ablation-decoder-unet-ffl": {"refinement": "unet"},
    }[name]
    assert parts(other) == {**parts(full), **changed}
    assert other.experts == demo.experts and other.autoencoder == demo.autoencoder


def parts(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe that an ablation preset may change."""
    assert recipe.model.unet is not None
    return {
        "experts": len(recipe.model.expert_ranges),
        "space": recipe.model.unet.space_experts,
        "fusion": recipe.model.decoder.fusion_level,
        "refinement": recipe.model.decoder.refinement,
        "ffl": recipe.decoder.frequency_weight,
    }


def test_sharing_gamma_is_constant_or_a_ramp():
    assert [ExpertStage().gamma_at(step) for step in (0, 1, 10**6)] == [0.999] * 3
    ramp = ExpertStage(sharing="ramp")
    assert [1 - ramp.gamma_at(s) for s in (0, 1, 5000, 10_000, 20_000)] == pytest.approx(
        [0, 3e-5, 0.15, 0.3, 0.3]
    )
    assert ExpertStage(sharing="none").gamma_at(5) is None


def test_changes_are_json_values_by_dotted_path(tmp_path):
    path = str(tiny.write_recipe(tmp_path / "r.json"))
    changes = [
        "experts.steps=7",
        "degradation=blind",
        "model.decoder.fusion_level=null",
        "decoder.betas=[0.5, 0.9]",
    ]
    recipe = load_recipe(path, changes)
    assert (recipe.experts.steps, recipe.degradation) == (7, "blind")
    assert recipe.model.decoder.fusion_level is None and recipe.decoder.betas == (0.5, 0.9)
    assert recipe.experts.batch == 2


def test_base_is_a_preset_or_a_file_in_the_same_folder(tmp_path):
    tiny.write_recipe(tmp_path / "tiny.json")
    (tmp_path / "child.json").write_text(json.dumps({"base": "tiny.json", "experts": {"steps": 9}}))
    (tmp_path / "grandchild.json").write_text(json.dumps({"base": "child.json", "seed": 4}))
    recipe = load_recipe(str(tmp_path / "grandchild.json"))
    assert (recipe.seed, recipe.experts.steps, recipe.experts.batch) == (4, 9, 2)
    (tmp_path / "demo.json").write_text('{"base": "demo-x4", "seed": 1}')
    assert load_recipe(str(tmp_path / "demo.json")).model == load_recipe("demo-x4").model


def test_recipe_that_is_its_own_base_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"base": "b.json"}')
    (tmp_path / "b.json").write_text('{"base": "a.json"}')
    with pytest.raises(UsageError, match="is its own base"):
        load_recipe(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("experts.stepz=1", r"r\.json: unknown entries experts\.stepz, expected .*steps"),
        ("expertz.steps=1", r"unknown entries expertz"),
        ("experts.steps=many", r"experts\.steps is 'many', expected int"),
        ("degradation=jpeg", r"degradation is 'jpeg', expected one of"),
        ("experts.steps", r"--set experts\.steps: expected key=value"),
        ("experts..steps=1", "expected key=value"),
        ("experts.batch=0", r"experts\.batch is 0, expected at least 1"),
        ("experts.learning_rate=-1", "experts.learning_rate is -1.0, expected at least 0"),
        ("experts.gamma=1.5", "gamma is 1.5, expected 0.0 to 1.0"),
        ("autoencoder.ema_decay=1.0", "ema_decay is 1.0, expected at least 0.0 and less than 1.0"),
        ("decoder.latents=0", "decoder.latents is 0, expected at least 1"),
        ("experts.patch_px=36", r"experts\.patch_px is 36, expected a multiple of 8"),
        ("seed=-1", "seed is -1"),
        ("model.expert_ranges=[[0, 400], [500, 1000]]", "must follow one another"),
        ("model.schedule.beta_start=2.0", "betas must satisfy"),
    ],
    ids=lambda text: str(text)[:30],
)
def test_message_names_the_mistake(change, message, tmp_path):
    path = tiny.write_recipe(tmp_path / "r.json")
    with pytest.raises(UsageError, match=message):
        load_recipe(str(path), [change])


def test_patch_size_must_suit_the_refinement_network(tmp_path):
    """It halves the image twice and then needs an even width; the other networks need a multiple of 4."""
    path = tiny.write_recipe(tmp_path / "r.json")
    shallow = ["model.unet.channel_mult=[1]", "model.unet.attention_factors=[1]", "decoder.patch_px=36"]
    with pytest.raises(UsageError, match=r"decoder\.patch_px is 36, expected a multiple of 8"):
        load_recipe(str(path), [*shallow, "model.decoder.refinement=aff"])
    assert load_recipe(str(path), [*shallow, "model.decoder.refinement=none"]).model.tile_multiple == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such recipe file; presets are .*demo-x4"), ("{", "not JSON"), ("[1]", "got list, expected")],
    ids=["absent", "broken", "list"],
)
def test_unreadable_recipes_are_refused(content, message, tmp_path):
    path = tmp_path / "r.json"
    if content:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_recipe(str(path))
