"""StableSR's published files import as its networks; if a file is damaged, the error names it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from published_files import BUFFERS, run, tensors
from safetensors.torch import save_file
from stablesr import FULL, NARROW, NETWORKS, SALT

from moesr.training.checkpoint import CheckpointError, StableSRCheckpoint, load_checkpoint, save_checkpoint
from moesr.training.networks import Autoencoder
from moesr.training.weights import meta_network

LIMIT = 1e-5
PREFIXES = {
    "unet": "model.diffusion_model.",
    "structcond": "structcond_stage_model.",
    "text": "cond_stage_model.",
}
HEADS = ("--head-channels", 16)  # of the narrow networks

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def states(published_weights) -> dict[str, State]:
    networks = (*PREFIXES, "vae_cfw")
    return {name: tensors(published_weights(f"stablesr_{name}_narrow", SALT)) for name in networks}


@pytest.fixture(scope="module")
def whole(states) -> State:
    """The tensors of a published file. The autoencoder in it is zero, since it must not be used."""
    parts = {prefix + k: v for name, prefix in PREFIXES.items() for k, v in states[name].items()}
    vae = {k: v for k, v in states["vae_cfw"].items() if "fusion_layer" not in k}
    parts |= {f"first_stage_model.{key}": torch.zeros_like(tensor) for key, tensor in vae.items()}
    return parts | {name: torch.linspace(0, 1, 1000) for name in BUFFERS}


@pytest.fixture(scope="module")
def cfw(states, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cfw") / "vqgan_cfw_00011.ckpt"
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(1)}
    torch.save({"state_dict": states["vae_cfw"] | loss}, path)
    return path


@pytest.fixture(scope="module")
def imported(whole, cfw, tmp_path_factory) -> StableSRCheckpoint:
    folder = tmp_path_factory.mktemp("stablesr")
    torch.save({"state_dict": whole, "epoch": 117}, folder / "stablesr_000117.ckpt")
    args = ("--cfw", cfw, *HEADS, "-o", folder / "model", "--quiet")
    assert run("--stablesr", folder / "stablesr_000117.ckpt", *args) == 0
    checkpoint = load_checkpoint(folder / "model")
    assert isinstance(checkpoint, StableSRCheckpoint)
    return checkpoint


def test_configuration_is_inferred(imported):
    assert imported.config == dataclasses.replace(NARROW, name="stablesr-x4")
    names = sorted(path.name for path in imported.directory.iterdir())
    parts = ("decoder", "expert_0", "structure", "text")
    assert names == ["config.json", *(f"{part}.safetensors" for part in parts)]
    assert [path.name for path in imported.files] == [names[0], names[2], names[3], names[4], names[1]]


def test_imported_weights_equal_the_files(imported, states):
    networks = {
        "unet": imported.unet(),
        "structcond": imported.structure(),
        "text": imported.text(),
        "vae_cfw": imported.decoder(),
    }
    for name, network in networks.items():
        assert not network.training
        got = network.state_dict()
        assert sorted(got) == sorted(states[name])
        assert all(torch.equal(got[key], states[name][key]) for key in got), name


@torch.inference_mode()
def test_imported_networks_match_golden(imported, golden):
    data = golden("stablesr_unet")
    keys = [key for key in data if key.startswith("struct.")]
    structure = {int(key.removeprefix("struct.")): torch.from_numpy(data[key]) for key in keys}
    z, t, text = (torch.from_numpy(data[key]) for key in ("x", "t", "context"))
    assert data.error("out", imported.unet()(z, t, structure, text).numpy()) < LIMIT


@pytest.mark.parametrize(
    ("file", "args", "name", "prediction", "steps"),
    [
        ("stablesr_turbo.ckpt", (), "stablesr-turbo-x4", "eps", 4),
        ("stablesr_768v_000139.ckpt", (), "stablesr-768v-x4", "v", 200),
        ("face_stablesr_000050.ckpt", (), "stablesr-face-x4", "v", 200),
        ("mine.ckpt", ("--prediction", "v"), "stablesr-x4", "v", 200),
        ("stablesr_turbo.ckpt", ("--prediction", "v", "--name", "a"), "a", "v", 4),
    ],
    ids=["turbo", "768v", "face", "told", "overruled"],
)
def test_variant_is_read_from_file_name(file, args, name, prediction, steps, whole, cfw, tmp_path, capsys):
    torch.save(whole, tmp_path / file)
    assert run("--stablesr", tmp_path / file, "--cfw", cfw, *HEADS, "-o", tmp_path / "model", *args) == 0
    config = load_checkpoint(tmp_path / "model").config
    assert (config.name, config.prediction, config.steps) == (name, prediction, steps)
    out = capsys.readouterr().out
    assert f"predicts {prediction}" in out and "LR fusion at level 1 and 2" in out


def test_unknown_file_name_needs_the_prediction_type(whole, cfw, tmp_path, capsys):
    torch.save(whole, tmp_path / "mine.ckpt")
    assert run("--stablesr", tmp_path / "mine.ckpt", "--cfw", cfw, *HEADS, "-o", tmp_path / "model") == 2
    assert "add --prediction" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_weights_can_be_stored_in_half_precision(imported, whole, cfw, tmp_path):
    save_file(whole, tmp_path / "stablesr_000117.safetensors")
    args = ("--cfw", cfw, *HEADS, "-o", tmp_path / "model", "--fp16")
    assert run("--stablesr", tmp_path / "stablesr_000117.safetensors", *args) == 0
    half = load_checkpoint(tmp_path / "model")
    assert isinstance(half, StableSRCheckpoint) and half.config == imported.config
    for path, full in zip(half.files[1:], imported.files[1:], strict=True):
        assert path.stat().st_size < 0.6 * full.stat().st_size
    for got, want in ((half.unet(), imported.unet()), (half.decoder(), imported.decoder())):
        values = want.state_dict()
        assert all(torch.equal(t, values[k].half().float()) for k, t in got.state_dict().items())


def test_moe_sr_decoder_can_be_stored_in_half_precision(states, tmp_path):
    path = tmp_path / "vqgan_cfw_00011.ckpt"
    torch.save(states["vae_cfw"], path)
    assert run("--decoder", path, "-o", tmp_path / "model", "--fp16") == 0
    stored = load_checkpoint(tmp_path / "model")
    assert isinstance(stored.decoder(), Autoencoder) and stored.config.decoder == NARROW.decoder
    assert stored.files[1].stat().st_size < 0.6 * path.stat().st_size


DAMAGED = {
    # Each entry: a change of the tensors, and text of the resulting message.
    "unet": (
        lambda s: s.pop("model.diffusion_model.out.2.bias"),
        "under model.diffusion_model.: missing out.2.bias;",
    ),
    "spade": (
        lambda s: s.pop("model.diffusion_model.input_blocks.4.0.spade.mlp_beta.bias"),
        "missing input_blocks.4.0.spade.mlp_beta.bias;",
    ),
    "structure": (
        lambda s: s.pop("structcond_stage_model.fea_tran.2.skip_connection.weight"),
        "under structcond_stage_model.: missing fea_tran.2.skip_connection.weight;",
    ),
    "text": (
        lambda s: s.pop("cond_stage_model.model.ln_final.bias"),
        "under cond_stage_model.: missing model.ln_final.bias;",
    ),
    "no-structure": (
        lambda s: [s.pop(key) for key in list(s) if key.startswith("structcond")],
        "holds nothing under structcond_stage_model. (structure);",
    ),
    "unknown": (lambda s: s.update({"model_ema.decay": torch.ones(())}), "unknown model_ema.decay;"),
    "unknown-inside": (
        lambda s: s.update({"cond_stage_model.model.extra": torch.ones(1)}),
        "under cond_stage_model.: unknown model.extra;",
    ),
    "infinite": (
        lambda s: s.update({"cond_stage_model.model.ln_final.bias": torch.full((64,), torch.inf)}),
        "under cond_stage_model.: model.ln_final.bias is not finite;",
    ),
    "other-text": (
        lambda s: s.update({"cond_stage_model.model.token_embedding.weight": torch.ones(49408, 128)}),
        "and of the latent are (32, 4, 128, 4), the UNet expects (32, 4, 64, 4)",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_message_names_the_damaged_file(fault, whole, cfw, tmp_path, capsys):
    change, message = DAMAGED[fault]
    state = dict(whole)
    change(state)
    path = tmp_path / "stablesr_000117.ckpt"
    torch.save({"state_dict": state}, path)
    assert run("--stablesr", path, "--cfw", cfw, *HEADS, "-o", tmp_path / "model") == 1
    error = capsys.readouterr().err
    assert str(path) in error and message in error
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_channels_that_are_no_multiple_of_the_heads_are_refused(whole, cfw, tmp_path, capsys):
    torch.save(whole, tmp_path / "stablesr_000117.ckpt")
    args = ("--stablesr", tmp_path / "stablesr_000117.ckpt", "--cfw", cfw, "-o", tmp_path / "model")
    assert run(*args) == 1
    assert "no heads of 64 (--head-channels)" in capsys.readouterr().err


def test_autoencoder_without_feature_wrapping_is_refused(whole, states, tmp_path, capsys):
    torch.save(whole, tmp_path / "stablesr_000117.ckpt")
    plain = {key: t for key, t in states["vae_cfw"].items() if "fusion_layer" not in key}
    torch.save(plain, tmp_path / "vae.ckpt")
    args = ("--cfw", tmp_path / "vae.ckpt", *HEADS, "-o", tmp_path / "model")
    assert run("--stablesr", tmp_path / "stablesr_000117.ckpt", *args) == 1
    assert "vae.ckpt: is not a KL autoencoder with feature wrapping" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--stablesr", "a"), "needs both --stablesr FILE and --cfw FILE"),
        (("--cfw", "a"), "needs both --stablesr FILE and --cfw FILE"),
        (("--stablesr", "a", "--cfw", "b", "--decoder", "c"), "got --stablesr and --decoder"),
        (("--decoder", "a", "--prediction", "v"), "got --prediction and --decoder"),
        ((), "got no autoencoder; add --decoder FILE"),
    ],
    ids=["no cfw", "no model", "two families", "prediction", "nothing"],
)
def test_arguments_must_name_the_files_of_one_family(args, message, tmp_path, capsys):
    assert run(*args, "-o", tmp_path / "model") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["stablesr_000117.ckpt", "vqgan_cfw_00011.ckpt"])
def test_message_names_missing_files(missing, tmp_path, capsys):
    paths = [tmp_path / name for name in ("stablesr_000117.ckpt", "vqgan_cfw_00011.ckpt")]
    for path in paths:
        if path.name != missing:
            path.write_bytes(b"x")
    assert run("--stablesr", paths[0], "--cfw", paths[1], "-o", tmp_path / "model") == 1
    assert f"{tmp_path / missing}: no such file" in capsys.readouterr().err


def test_networks_of_the_other_family_are_refused(imported):
    with pytest.raises(CheckpointError, match="its expert is a StableSRUNet, expected a DenoisingUNet"):
        imported.expert(0)


def test_message_names_an_unknown_family(imported, tmp_path):
    values = json.loads((imported.directory / "config.json").read_text())
    assert values["family"] == "stablesr"
    (tmp_path / "config.json").write_text(json.dumps(values | {"family": "next"}))
    with pytest.raises(CheckpointError, match="family is 'next', this version reads stablesr"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_needs_every_network(imported, states, tmp_path):
    def save(*others: tuple[str, State]) -> None:
        save_checkpoint(
            tmp_path / "model", imported.config, [states["unet"]], states["vae_cfw"], others=others
        )

    with pytest.raises(CheckpointError, match="got no weights of text, which stablesr-x4 needs"):
        save(("structure", states["structcond"]))
    with pytest.raises(CheckpointError, match="got weights of 'prompt', expected those of"):
        save(("prompt", states["text"]))
    assert not list(tmp_path.iterdir())


def test_the_hash_covers_every_network(imported, tmp_path):
    digest, text = imported.sha256(), imported.directory / "text.safetensors"
    before = text.read_bytes()
    try:
        text.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert imported.sha256() != digest
    finally:
        text.write_bytes(before)


@pytest.mark.slow
def test_full_width_model_imports(tmp_path):
    """All shapes are the published ones. Each tensor is one repeated number, which saves memory."""
    states = {name: alike(kind, sizes) for name, (kind, sizes) in NETWORKS.items() if name.endswith("_full")}
    whole = {prefix + k: v for n, prefix in PREFIXES.items() for k, v in states[f"{n}_full"].items()}
    torch.save({"state_dict": whole}, tmp_path / "stablesr_768v_000139.ckpt")
    torch.save({"state_dict": states["vae_cfw_full"]}, tmp_path / "vqgan_cfw_00011.ckpt")
    args = ("--cfw", tmp_path / "vqgan_cfw_00011.ckpt", "-o", tmp_path / "model", "--fp16")
    assert run("--stablesr", tmp_path / "stablesr_768v_000139.ckpt", *args) == 0
    checkpoint = load_checkpoint(tmp_path / "model")
    want = dataclasses.replace(FULL, name="stablesr-768v-x4", prediction="v", tile=768)
    assert checkpoint.config == want
    size = sum(path.stat().st_size for path in checkpoint.files)
    assert size == pytest.approx(2 * 1453.505e6, rel=1e-3)
    shutil.rmtree(tmp_path / "model")


def alike(kind: type[torch.nn.Module], sizes: object) -> State:
    """Return weights of a network that are all the same number and therefore take no memory."""
    shapes = meta_network(kind, sizes).state_dict()
    return {key: torch.full((), 0.5).expand(tensor.shape) for key, tensor in shapes.items()}


def test_prompts_are_stored_in_the_configuration(imported):
    assert imported.config.text.prompt == (49406, 49407)
    assert np.all(np.array(imported.config.text.negative_prompt) < imported.config.text.vocabulary)
