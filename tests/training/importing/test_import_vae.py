"""Autoencoders of text-to-image models become checkpoints, from every layout in which they are published."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers_files import vae_shapes
from published_files import ldm_level, random_state, run, tensors
from safetensors.torch import save_file
from weights_of_names import weights

from moesr.training.checkpoint import load_checkpoint
from moesr.training.config import KL_AUTOENCODER, KL_F8, VaeConfig
from moesr.training.importing.diffusers_names import vae_state
from moesr.training.networks import Autoencoder

NARROW = dataclasses.replace(KL_F8, channels=8, norm_groups=4)
PLAIN = dataclasses.replace(KL_AUTOENCODER, channels=8, norm_groups=4)
ENCODER = ("encoder.", "quant_conv.")


@pytest.fixture
def published():
    return random_state(Autoencoder(NARROW))


def imported(path, tmp_path, *options):
    assert run("--decoder", path, "-o", tmp_path / "model", "--norm-groups", 4, *options) == 0
    return load_checkpoint(tmp_path / "model")


def holds(checkpoint, want) -> bool:
    got = checkpoint.decoder().state_dict()
    return got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_config_has_the_scaling_factor_and_nothing_of_a_sampler(published, tmp_path, capsys):
    torch.save(published, tmp_path / "fa_vae.pth")
    checkpoint = imported(tmp_path / "fa_vae.pth", tmp_path)
    assert checkpoint.config == VaeConfig(decoder=NARROW)
    assert holds(checkpoint, published)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (stored["name"], stored["latent_scale"], stored["encoder"]) == ("kl-f8", 0.18215, True)
    assert stored.keys() == {"schema", "family", "name", "decoder", "latent_scale", "encoder"}
    assert "scaling factor 0.18215" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["flat", "state_dict", "half", "counters", "extras", "safetensors", "whole"])
def test_published_files_are_read_in_every_form(published, tmp_path, form):
    state, path = dict(published), tmp_path / "fa_vae.ckpt"
    if form == "half":
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    if form == "counters":
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if form == "extras":
        state |= dict.fromkeys(("loss.perceptual.w", "logvar", "model_ema.decay"), torch.zeros(1))
    if form == "whole":
        others = {"model.diffusion_model.out.2.weight": torch.zeros(4), "cond_stage_model.x": torch.zeros(1)}
        state = ldm_level({}, first_stage=published) | others
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if form in ("state_dict", "whole") else state, path)
    want = published
    if form == "half":
        want = {k: v.half().float() if v.is_floating_point() else v for k, v in published.items()}
    assert holds(imported(path, tmp_path), want)


@pytest.mark.parametrize("quant_conv", [False, True])
def test_file_without_encoder_gives_a_decoder_alone(published, tmp_path, capsys, quant_conv):
    kept = {k: v for k, v in published.items() if not k.startswith(ENCODER[: 1 if quant_conv else 2])}
    torch.save(kept, tmp_path / "decoder.pt")
    checkpoint = imported(tmp_path / "decoder.pt", tmp_path)
    assert checkpoint.config == VaeConfig(decoder=NARROW, encoder=False)
    assert holds(checkpoint, {k: v for k, v in published.items() if not k.startswith(ENCODER)})
    assert "decoder without an encoder" in capsys.readouterr().out


def test_incomplete_encoder_is_an_error(published, tmp_path, capsys):
    del published["encoder.mid.block_1.conv1.weight"]
    torch.save(published, tmp_path / "decoder.pt")
    assert run("--decoder", tmp_path / "decoder.pt", "-o", tmp_path / "model", "--norm-groups", 4) == 1
    assert "missing encoder.mid.block_1.conv1.weight" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("place", ["file", "vae", "pipeline"])
def test_plain_weights_of_diffusers(tmp_path, place, old):
    state = tensors(weights(vae_shapes(8), "dev"))
    want = vae_state(state)
    if old:
        for new, name in OLD.items():
            state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in state.items()}
    folder = tmp_path / ("sd/vae" if place == "pipeline" else "sd")
    folder.mkdir(parents=True)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"scaling_factor": 0.13025, "shift_factor": None}))
    path = folder / "diffusion_pytorch_model.safetensors" if place == "file" else tmp_path / "sd"
    checkpoint = imported(path, tmp_path)
    assert checkpoint.config == VaeConfig(decoder=PLAIN, latent_scale=0.18215 if place == "file" else 0.13025)
    assert holds(checkpoint, want)


def test_plain_weights_of_stable_diffusion(tmp_path):
    state = random_state(Autoencoder(PLAIN))
    torch.save({"state_dict": ldm_level({}, first_stage=state)}, tmp_path / "v1-5.ckpt")
    checkpoint = imported(tmp_path / "v1-5.ckpt", tmp_path, "--latent-scale", 0.2, "--name", "mine")
    assert checkpoint.config == VaeConfig(name="mine", decoder=PLAIN, latent_scale=0.2)
    assert holds(checkpoint, state)


def test_shifted_latents_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"scaling_factor": 1.5, "shift_factor": 0.06}))
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert run("--decoder", tmp_path, "-o", tmp_path / "model") == 1
    assert "shift_factor is 0.06" in capsys.readouterr().err


def test_options_that_do_not_apply(published, tmp_path, capsys):
    torch.save(published, tmp_path / "fa_vae.pth")
    assert run("--decoder", tmp_path / "fa_vae.pth", "-o", tmp_path / "model", "--scale", 4) == 2
    assert "leave out --scale" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--decoder", tmp_path / "fa_vae.pth", "-o", tmp_path / "model", "--latent-scale", 0)
