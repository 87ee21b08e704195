"""Published files of Stable Diffusion import as a checkpoint from which StableSR's training can start."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import diffusers_files as files
import pytest
import torch
from published_files import BUFFERS, run
from safetensors.torch import save_file
from weights_of_names import weights

from moesr.training.checkpoint import CheckpointError, StableDiffusionCheckpoint, load_checkpoint
from moesr.training.config import (
    KL_AUTOENCODER,
    StableDiffusionConfig,
    StableSRUNetConfig,
    TextConfig,
)
from moesr.training.importing.diffusers_names import text_state, unet_state, vae_state
from moesr.training.weights import meta_network, networks

NARROW = StableDiffusionConfig(
    unet=StableSRUNetConfig(width=32, head_channels=16, text_channels=64, structure_channels=0),
    text=TextConfig(width=64, layers=3, heads=4, vocabulary=99),
    decoder=dataclasses.replace(KL_AUTOENCODER, channels=32),
)
HEADS = ("--head-channels", 16)
FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model."}

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def parts() -> dict[str, State]:
    """State dicts of the networks in the layout of diffusers."""
    shapes = {
        "unet": files.unet_shapes(32, 64),
        "vae": files.vae_shapes(32),
        "text": files.text_shapes(64, 2, vocabulary=99),
    }
    return {n: {k: torch.from_numpy(v) for k, v in weights(s, "dev").items()} for n, s in shapes.items()}


@pytest.fixture(scope="module")
def whole(parts) -> State:
    """The tensors of a published file that holds all networks."""
    states = {"unet": unet_state(parts["unet"]), "vae": vae_state(parts["vae"])}
    states["text"] = text_state(parts["text"])
    joined = {PREFIXES[name] + key: t for name, state in states.items() for key, t in state.items()}
    return joined | {name: torch.linspace(0, 1, 1000) for name in BUFFERS}


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory) -> Path:
    """A directory of diffusers that holds all networks."""
    root = tmp_path_factory.mktemp("stable-diffusion-2-1")
    for name, place in FOLDERS.items():
        (root / place).mkdir()
        stem = "model" if name == "text" else "diffusion_pytorch_model"
        save_file(parts[name], root / place / f"{stem}.safetensors")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    return root


def imported(*args: object, to: Path) -> StableDiffusionCheckpoint:
    assert run("--stable-diffusion", *args, *HEADS, "-o", to, "--quiet") == 0
    checkpoint = load_checkpoint(to)
    assert isinstance(checkpoint, StableDiffusionCheckpoint)
    return checkpoint


def state_of(checkpoint: StableDiffusionCheckpoint) -> State:
    states = {"unet": checkpoint.unet(), "text": checkpoint.text(), "vae": checkpoint.decoder()}
    return {PREFIXES[n] + k: t for n, network in states.items() for k, t in network.state_dict().items()}


def test_both_layouts_import_the_same_weights(whole, folder, tmp_path):
    torch.save({"state_dict": whole, "global_step": 1}, tmp_path / "v2-1_512-ema-pruned.ckpt")
    one = imported(tmp_path / "v2-1_512-ema-pruned.ckpt", to=tmp_path / "one")
    many = imported(folder, to=tmp_path / "many")
    assert one.config == NARROW
    assert many.config == dataclasses.replace(NARROW, prediction="v")
    first, second = state_of(one), state_of(many)
    assert first.keys() == second.keys() == whole.keys() - set(BUFFERS)
    assert all(torch.equal(first[key], second[key]) and torch.equal(first[key], whole[key]) for key in first)


def test_networks_import_from_separate_files(folder, tmp_path):
    """The networks are recognized by their tensors, in any order and under any file name."""
    paths = []
    for name, place in FOLDERS.items():
        source = next((folder / place).iterdir())
        paths.insert(0, shutil.copy(source, tmp_path / f"{name}.safetensors"))
    got = imported(*paths, "--prediction", "eps", "--fp16", to=tmp_path / "model")
    assert got.config == NARROW
    want = state_of(imported(folder, to=tmp_path / "whole"))
    assert all(torch.equal(tensor, want[key].half().float()) for key, tensor in state_of(got).items())


def test_averaged_weights_are_preferred(whole, tmp_path):
    prefix = PREFIXES["unet"]
    dotless = {
        f"model_ema.diffusion_model{k.removeprefix(prefix).replace('.', '')}": t + 1
        for k, t in whole.items()
        if k.startswith(prefix)
    }
    save_file(whole | dotless, tmp_path / "v2-1_768-nonema.safetensors")
    got = imported(tmp_path / "v2-1_768-nonema.safetensors", to=tmp_path / "model")
    assert got.config.prediction == "v"
    key = f"{prefix}out.2.weight"
    assert torch.equal(state_of(got)[key], whole[key] + 1)


@pytest.mark.parametrize("name", ["512-base-ema", "sd_turbo", "768-v-ema"])
def test_prediction_type_is_read_from_the_file_name(name, whole, tmp_path):
    save_file(whole, tmp_path / f"{name}.safetensors")
    got = imported(tmp_path / f"{name}.safetensors", to=tmp_path / "model")
    assert got.config.prediction == ("v" if "768" in name else "eps")


DAMAGED = {
    # Each entry: a change of the tensors, and text of the resulting message.
    "unet": (
        lambda s: s.pop("model.diffusion_model.middle_block.1.proj_in.weight"),
        "under model.diffusion_model.: missing middle_block.1.proj_in.weight;",
    ),
    "text": (
        lambda s: s.pop("cond_stage_model.model.ln_final.bias"),
        "under cond_stage_model.: missing model.ln_final.bias;",
    ),
    "no autoencoder": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("first_stage_model.")],
        "no weights of decoder",
    ),
    "unknown": (lambda s: s.update({"control.weight": torch.ones(1)}), "unknown control.weight;"),
    "infinite": (
        lambda s: s.update({"first_stage_model.quant_conv.bias": torch.full((8,), torch.inf)}),
        "under first_stage_model.: quant_conv.bias is not finite;",
    ),
    "version 1": (
        lambda s: s.update({"cond_stage_model.transformer.text_model.embeddings.x": torch.ones(1)}),
        "holds the text encoder of Stable Diffusion 1; StableSR needs Stable Diffusion 2.1",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_message_names_the_damaged_file(fault, whole, tmp_path, capsys):
    change, message = DAMAGED[fault]
    state = dict(whole)
    change(state)
    path = tmp_path / "v2-1_512.ckpt"
    torch.save(state, path)
    assert run("--stable-diffusion", path, *HEADS, "-o", tmp_path / "model") == 1
    error = capsys.readouterr().err
    assert str(path) in error and message in error
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("mine.ckpt",), 2, "add --prediction eps"),
        (("missing_512.ckpt",), 1, "missing_512.ckpt: no such file"),
        (("mine.ckpt", "--cfw", "b"), 2, "got --stable-diffusion and --cfw"),
        (("empty",), 1, "no weights there, expected one of diffusion_pytorch_model.safetensors"),
    ],
    ids=["prediction", "missing", "two families", "empty directory"],
)
def test_wrong_arguments_are_refused(args, code, message, whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(whole, "mine.ckpt")
    Path("empty").mkdir()
    assert run("--stable-diffusion", *args, *HEADS, "-o", "model") == code
    assert message in capsys.readouterr().err


def test_message_names_tensors_that_a_diffusers_file_lacks(parts, folder, tmp_path, capsys):
    state = {k: t for k, t in parts["unet"].items() if k != "mid_block.attentions.0.proj_in.bias"}
    for name, place in FOLDERS.items():
        save_file(state if name == "unet" else parts[name], tmp_path / f"{place}.safetensors")
    paths = [tmp_path / f"{place}.safetensors" for place in FOLDERS.values()]
    assert run("--stable-diffusion", *paths, "--prediction", "eps", *HEADS, "-o", tmp_path / "model") == 1
    assert f"{paths[0]}: missing middle_block.1.proj_in.bias;" in capsys.readouterr().err


def test_message_names_a_scheduler_file_with_an_unsupported_prediction_type(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "sd")
    config = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"prediction_type": "sample"}))
    assert run("--stable-diffusion", tmp_path / "sd", *HEADS, "-o", tmp_path / "model") == 1
    error = capsys.readouterr().err
    assert str(config) in error and "add --prediction" in error


def test_checkpoint_of_stable_diffusion_has_no_sampling_expert(folder, tmp_path):
    """The checkpoint opens; asking it for a sampling expert raises an error that names its family."""
    checkpoint = imported(folder, to=tmp_path / "model")
    with pytest.raises(CheckpointError, match="its expert is a StableSRUNet, expected a DenoisingUNet"):
        checkpoint.expert(0)


def test_full_width_networks_have_the_published_parameter_counts():
    """The UNet has 865.911 M parameters, which are those of StableSR's UNet without SPADE."""
    counts = {
        part: sum(p.numel() for p in meta_network(*network).parameters())
        for part, network in networks(StableDiffusionConfig()).items()
    }
    assert counts["expert"] == pytest.approx((918.931 - 53.020) * 1e6, abs=1e3)
    assert counts["text"] == pytest.approx(354.033e6, abs=1e3)
    assert counts["decoder"] == pytest.approx((34.164 + 49.490) * 1e6, abs=1e3)
