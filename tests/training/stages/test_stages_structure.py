"""StableSR's two stages: frozen weights do not change, the loss falls, resuming and sampling are exact."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny_stablesr
import tiny_training as tiny
import torch
from conftest import relative_l2
from stablesr import sample
from torch import Tensor

from moesr.export.options import ExportOptions
from moesr.export.package import export_engine
from moesr.runtime.errors import UsageError
from moesr.runtime.sampling.schedule import step_table
from moesr.runtime.upscaler import Upscaler
from moesr.training.checkpoint import CheckpointError, StableSRCheckpoint, load_checkpoint
from moesr.training.cli import main
from moesr.training.config import StableSRConfig
from moesr.training.loop.fit import fit
from moesr.training.losses.diffusion import add_noise, denoising_loss, predict_x0
from moesr.training.recipe import load_recipe
from moesr.training.seeded_random import DIFFUSION, SAMPLING, SampleRng
from moesr.training.stages import decoder, latents, structure
from moesr.training.stages.common import with_lr
from moesr.training.stages.structure import denoiser_of, scaled_latent

RECIPE = tiny_stablesr.recipe()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tiny.photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny_stablesr.stable_diffusion(tmp_path_factory.mktemp("sd") / "checkpoint", RECIPE)


@pytest.fixture(scope="module")
def trained(photos, start, tmp_path_factory):
    return train(photos, tmp_path_factory.mktemp("stage1"), start)


def train(photos, directory, start, recipe=RECIPE, **options) -> StableSRCheckpoint:
    structure.train(recipe, tiny.crops(photos), tiny.run(directory), start, **options)
    checkpoint = load_checkpoint(directory / "checkpoint")
    assert isinstance(checkpoint, StableSRCheckpoint)
    return checkpoint


def test_stage_1_does_not_change_stable_diffusion(start, trained):
    before, after = start.unet().state_dict(), trained.unet().state_dict()
    assert set(after) - set(before) == {key for key in after if ".spade." in key}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert tiny.same(trained.text().state_dict(), start.text().state_dict())
    assert tiny.same(trained.decoder().state_dict(), start.decoder().state_dict())


def test_stage_1_trains_the_structure_encoder_and_spade(photos, start, trained, tmp_path):
    untrained = train(photos, tmp_path, start, tiny_stablesr.recipe(structure={"steps": 0}))
    for fresh, after in (
        (untrained.structure(), trained.structure()),
        (untrained.unet(), trained.unet()),
    ):
        changed = {k for k, p in after.named_parameters() if not torch.equal(p, fresh.get_parameter(k))}
        wanted = {k for k, _ in after.named_parameters() if ".spade." in k or "fea_tran" in k}
        assert wanted and wanted <= changed


def test_saved_state_holds_no_frozen_weights(photos, start, trained):
    state = torch.load(trained.directory.parent / "last.pt", weights_only=True)
    spades = sum(p.numel() for k, p in trained.unet().named_parameters() if ".spade." in k)
    encoder = sum(p.numel() for p in trained.structure().parameters())
    assert sum(t.numel() for t in state["ema"].values()) == spades + encoder


def test_loss_falls_on_unseen_crops(photos, start, tmp_path):
    """The fall is small, since the frozen networks are random."""
    recipe = tiny_stablesr.recipe(structure={"steps": 20, "batch": 4})
    objective, data = (
        structure.prepare(recipe, start, tiny.run(tmp_path)),
        with_lr(tiny.crops(photos), recipe, "cpu"),
    )
    unseen = [torch.stack(part) for part in zip(*(data[i] for i in range(1000, 1016)), strict=True)]
    with torch.no_grad():
        before = float(objective.loss(unseen, 0)[0])
    fit(objective, recipe.structure, data, tiny.run(tmp_path), "structure")
    with torch.no_grad():
        after = float(objective.loss(unseen, 0)[0])
    assert after < 0.87 * before


def test_latents_stay_float32_in_bf16_training(photos, start, tmp_path):
    recipe = tiny_stablesr.recipe(structure={"precision": "bf16", "steps": 2})
    objective = structure.prepare(recipe, start, tiny.run(tmp_path))
    batch = [torch.arange(2), tiny.crops(photos).crops(0, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        z, latent = objective.encode(batch, SampleRng(0, DIFFUSION, [0, 1]))
    assert z.dtype == latent.dtype == torch.float32
    train(photos, tmp_path / "run", start, recipe)
    assert np.isfinite(tiny.losses(tmp_path / "run")).all()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_resuming_is_exact(prediction, photos, tmp_path):
    recipe = tiny_stablesr.recipe(model={"prediction": prediction})
    start = tiny_stablesr.stable_diffusion(tmp_path / "sd", recipe)
    part = dataclasses.replace(recipe, structure=dataclasses.replace(recipe.structure, steps=2))
    train(photos, tmp_path / "parts", start, part)
    parts = train(photos, tmp_path / "parts", start, recipe)
    whole = train(photos, tmp_path / "whole", start, recipe)
    assert parts.sha256() == whole.sha256()
    assert tiny.losses(tmp_path / "parts") == tiny.losses(tmp_path / "whole")


def test_checkpoint_of_stage_1_serves_as_from_and_as_init(photos, start, trained, tmp_path):
    """As --from it gives its Stable Diffusion; as --init it gives the trained weights too."""
    recipe = tiny_stablesr.recipe(structure={"steps": 0})
    again = train(photos, tmp_path / "again", trained, recipe)
    fresh = train(photos, tmp_path / "fresh", start, recipe)
    assert again.sha256() == fresh.sha256()
    resumed = train(photos, tmp_path / "resumed", start, recipe, init=trained)
    assert tiny.same(resumed.structure().state_dict(), trained.structure().state_dict())
    assert tiny.same(resumed.unet().state_dict(), trained.unet().state_dict())


def test_encode_returns_scaled_latents_of_hr_and_enlarged_lr(photos, start):
    """Both latents are samples of the autoencoder's posterior, times the latent scale."""
    objective = structure.prepare(RECIPE, start, tiny.run(photos))
    hr = tiny.crops(photos).crops(0, 2)
    numbers, lr = torch.arange(2), hr[:, :, ::4, ::4].contiguous()
    z, latent = objective.encode([numbers, hr, lr], SampleRng(0, DIFFUSION, [0, 1]))
    assert z.shape == latent.shape == (2, 4, 8, 8)
    rng, first_stage = SampleRng(0, DIFFUSION, [0, 1]), start.decoder()
    noise = rng.normal(4, 8, 8)
    want = start.config.latent_scale * first_stage.sample(hr.float() / 127.5 - 1, noise)
    torch.testing.assert_close(z, want)
    assert not torch.equal(z, latent)


def test_loss_is_zero_for_a_perfect_prediction_of_each_type():
    """A network that knows the clean latents has no loss, whether it predicts eps, v or x0."""
    schedule = RECIPE.model.schedule
    z = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def oracle(prediction: str):
        def network(z_t: Tensor, cond: Tensor, t: Tensor) -> Tensor:
            alpha_bar = torch.from_numpy(schedule.alpha_bar.copy())[t][:, None, None, None]
            eps = (z_t - alpha_bar.sqrt() * z) / (1 - alpha_bar).sqrt()
            v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z
            return {"eps": eps, "v": v, "x0": z}[prediction]

        return network

    t = torch.tensor([5, 500, 990])
    for prediction in ("eps", "v", "x0"):
        rng = SampleRng(0, DIFFUSION, range(3))
        loss = denoising_loss(oracle(prediction), z, z, (0, 1000), schedule, rng, prediction=prediction)
        assert float(loss) < 1e-6
        z_t = add_noise(z, torch.randn_like(z), t, schedule)
        x0 = predict_x0(z_t, oracle(prediction)(z_t, z, t), t, schedule, prediction)
        torch.testing.assert_close(x0, z)


@torch.inference_mode()
def test_sampled_latents_equal_those_of_the_sampling_loop(photos, trained, tmp_path):
    """The reference is the loop that the goldens verify, starting from the noised LR latent."""
    config = RECIPE.model
    assert isinstance(config, StableSRConfig)
    data = tiny.crops(photos)
    latents.make(RECIPE, trained, data, tiny.run(tmp_path), tmp_path / "set", 5)
    _, hr, lr, got = latents.Triples(tmp_path / "set", None)[3]
    rng, model = SampleRng(0, SAMPLING, [3]), denoiser_of(trained, config, tiny.CPU)
    enlarged = structure.to_float(structure.resize_batch(lr[None], *hr.shape[-2:]))
    latent = scaled_latent(trained.decoder(), enlarged, rng, config)
    alpha_bar = config.schedule.alpha_bar[-1]
    z = np.sqrt(alpha_bar) * latent + np.sqrt(1 - alpha_bar) * rng.normal(4, 8, 8)
    table = step_table(config.schedule, 3, 1.0, config.expert_ranges)
    noise = [rng.normal(4, 8, 8).numpy() for _ in range(2)]

    def network(z: np.ndarray, cond: np.ndarray, t: int) -> np.ndarray:
        return model(torch.from_numpy(z), torch.from_numpy(cond), torch.tensor([t])).numpy()

    noise = np.stack([*noise, np.zeros_like(noise[0])])
    want = sample(network, z.float().numpy(), latent.numpy(), noise, table, config.prediction)[-1]
    assert relative_l2(got.numpy(), want[0] / config.latent_scale) < 1e-5


def test_stage_2_trains_only_the_feature_wrapping(photos, trained, tmp_path):
    recipe = tiny_stablesr.recipe(decoder={"adversarial_weight": 0.025, "adversarial_scaling": "fixed"})
    decoder.train(recipe, tiny.crops(photos), tiny.run(tmp_path), trained)
    whole = load_checkpoint(tmp_path / "checkpoint")
    assert isinstance(whole, StableSRCheckpoint) and whole.config == recipe.model
    for before, after in (
        (trained.unet(), whole.unet()),
        (trained.structure(), whole.structure()),
        (trained.text(), whole.text()),
    ):
        assert tiny.same(before.state_dict(), after.state_dict())
    before, after = trained.decoder().state_dict(), whole.decoder().state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    new = {key for key in after if key not in before}
    assert new and all(key.startswith("decoder.fusion_layer_") for key in new)
    z, lr = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        plain, free, faithful = (
            trained.decoder().decode(z),
            whole.decoder().decode(z, lr, 0.0),
            whole.decoder().decode(z, lr, 1.0),
        )
    assert torch.equal(plain, free) and not torch.equal(free, faithful)


@pytest.mark.parametrize("scaling", ["fixed", "adaptive"])
def test_adversarial_weight_is_fixed_or_adaptive(scaling, photos, trained, tmp_path):
    entries = {"adversarial_weight": 0.025, "adversarial_scaling": scaling, "steps": 1}
    recipe = tiny_stablesr.recipe(decoder=entries)
    decoder.train(recipe, tiny.crops(photos), tiny.run(tmp_path), trained)
    line = json.loads((tmp_path / "losses.jsonl").read_text().splitlines()[0])
    assert (line["adv_weight"] == 1.0) == (scaling == "fixed")


def test_stage_2_resumes_exactly(photos, trained, tmp_path):
    for place, stops in (("parts", (1, 3)), ("whole", (3,))):
        for steps in stops:
            recipe = tiny_stablesr.recipe(decoder={"steps": steps})
            decoder.train(recipe, tiny.crops(photos), tiny.run(tmp_path / place), trained)
    parts, whole = (load_checkpoint(tmp_path / place / "checkpoint") for place in ("parts", "whole"))
    assert parts.sha256() == whole.sha256()


def test_both_stages_run_from_the_command_line(photos, start, tmp_path, capsys):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_stablesr.TINY))
    args = ["all", "--config", str(tmp_path / "tiny.json"), "--data", str(photos), "--val", str(photos)]
    args += ["-o", str(tmp_path / "out"), "--quiet"]
    assert main(args) == 2
    assert "give --from with the checkpoint of moesr-import --stable-diffusion" in capsys.readouterr().err
    assert main([*args, "--from", str(start.directory)]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"structure", "decoder"}
    whole = load_checkpoint(tmp_path / "out" / "decoder" / "checkpoint")
    assert whole.config.decoder.fusion_levels == (1, 2)
    best = load_checkpoint(tmp_path / "out" / "structure" / "checkpoint-best")
    assert best.config.decoder.fusion_levels == ()
    dry = ["structure", *args[1:5], "-o", str(tmp_path / "dry"), "--from", str(start.directory)]
    assert main([*dry, "--dry-run"]) == 0
    assert "M trained" in capsys.readouterr().out


def test_latents_made_by_their_own_command_give_the_same_decoder(photos, trained, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_stablesr.TINY))
    common = ["--config", tmp_path / "tiny.json", "--from", trained.directory, "--quiet"]
    given = {"decoder": ("--data", photos), "latents": ("--data", photos)}
    for stage, source in given.items():
        assert main([str(a) for a in (stage, *common, *source, "-o", tmp_path / stage)]) == 0
    apart = ("decoder", *common, "--latents", tmp_path / "latents", "-o", tmp_path / "apart")
    assert main([str(a) for a in apart]) == 0
    first, second = (load_checkpoint(tmp_path / name / "checkpoint") for name in ("decoder", "apart"))
    assert first.sha256() == second.sha256()


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("experts", {}, "experts: tiny-stablesr has none, its stages are structure, decoder"),
        ("structure", {"model": {"prediction": "v"}}, "the recipe's model.prediction is v; make them equal"),
        ("structure", {"model": {"unet": {"width": 32}}}, "the recipe's model.unet is"),
        (
            "decoder",
            {},
            "has no structure encoder of this recipe; give the checkpoint of moesr-train structure",
        ),
        ("structure", {"structure": {"patch_px": 20}}, "structure.patch_px is 20, expected a multiple of 8"),
    ],
    ids=["stage", "prediction", "width", "start", "patch"],
)
def test_recipe_that_does_not_fit_the_checkpoint_is_refused(
    stage, changes, message, photos, start, tmp_path, capsys
):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_stablesr.merged(tiny_stablesr.TINY, changes)))
    args = [stage, "--config", tmp_path / "tiny.json", "--data", photos, "-o", tmp_path / "out"]
    assert main([str(arg) for arg in (*args, "--from", start.directory, "--quiet")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_models_have_no_structure_encoder(photos, start, tmp_path):
    with pytest.raises(UsageError, match="has no structure encoder to train"):
        train(photos, tmp_path, start, tiny.recipe())
    moe = tiny.first_stage(tmp_path / "vq", tiny.recipe())
    with pytest.raises(UsageError, match="holds no Stable Diffusion; give the directory that moesr-import"):
        train(photos, tmp_path, moe)


def test_presets_follow_the_paper():
    first, second = load_recipe("stablesr-stage1"), load_recipe("stablesr-stage2")
    assert first.model == second.model == StableSRConfig(name="stablesr-x4")
    assert 8 * first.structure.batch * first.structure.accumulate == 192  # the paper trains on eight GPUs
    assert first.structure.learning_rate == 5e-5 and first.structure.patch_px == 512
    assert (second.decoder.adversarial_weight, second.decoder.adversarial_scaling) == (0.025, "fixed")
    assert second.decoder.latents == 100_000 and second.decoder.latent_steps == 200


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoints_of_both_stages_become_engines(stage, photos, trained, tmp_path):
    """The graphs match the trained networks; a decoder without feature wrapping takes no LR features."""
    checkpoint = trained
    if stage == 2:
        decoder.train(RECIPE, tiny.crops(photos), tiny.run(tmp_path), trained)
        checkpoint = load_checkpoint(tmp_path / "checkpoint")
    manifest = export_engine(checkpoint, tmp_path / "engine", ExportOptions(tile_px=tiny.PATCH))
    inputs = {spec.name for spec in manifest.graphs["decoder"].inputs}
    assert ("fidelity" in inputs) == (stage == 2)
    with Upscaler(tmp_path / "engine") as up:
        image = up(np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8))
    assert image.shape == (48, 36, 3) and image.std() > 0


def test_stable_diffusion_cannot_be_exported_as_an_engine(start, tmp_path):
    with pytest.raises(CheckpointError, match="this is a checkpoint of another family"):
        export_engine(start, tmp_path / "engine", ExportOptions(tile_px=tiny.PATCH))
    assert not (tmp_path / "engine").exists()
