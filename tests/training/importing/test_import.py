"""Published weights import correctly from every file layout and model family."""

from __future__ import annotations

import collections
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_l2
from published_files import keep_space_experts, ldm_level, random_state, run, tensors
from safetensors.torch import save_file

from moesr.training.checkpoint import load_checkpoint, merge_space_experts
from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.importing.moe_sr import split_timesteps
from moesr.training.networks import Autoencoder, DenoisingUNet

LIMIT = 1e-5
UNET = UNetConfig(width=32)
VQ = AutoencoderConfig(channels=32, codebook_size=256)
PLAIN_VQ = dataclasses.replace(VQ, fusion_level=None, refinement="none")


@torch.inference_mode()
def eps_of(network: DenoisingUNet, data: dict[str, np.ndarray]) -> np.ndarray:
    x = torch.from_numpy(data["x"])
    return network(x[:, :3], x[:, 3:], torch.from_numpy(data["t"])).numpy()


@pytest.fixture(scope="module")
def unet_dev(published_weights) -> dict[str, torch.Tensor]:
    return tensors(published_weights("unet_w32", "dev"))


@pytest.fixture(scope="module")
def unet_other(published_weights) -> dict[str, torch.Tensor]:
    return tensors(published_weights("unet_w32", "another"))


@pytest.fixture(scope="module")
def vq_dev(published_weights) -> dict[str, torch.Tensor]:
    return tensors(published_weights("decoder_c32", "dev"))


@pytest.fixture(scope="module")
def vq_file(vq_dev, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vq-f4") / "fa_vae.pth"
    torch.save(vq_dev, path)
    return path


LAYOUTS = {
    # Each writer saves the wanted weights, and other weights that the import must not choose.
    "ema-buffers-first-stage": lambda p, want, other, vq: torch.save(
        {"state_dict": ldm_level(other, want, vq), "epoch": 3, "global_step": 9}, p
    ),
    "raw-under-state_dict": lambda p, want, other, vq: torch.save({"state_dict": ldm_level(want)}, p),
    "raw-without-level": lambda p, want, other, vq: torch.save(ldm_level(want, first_stage=vq), p),
    "bare": lambda p, want, other, vq: torch.save(want, p),
    "bare-ordered-dict": lambda p, want, other, vq: torch.save(collections.OrderedDict(want), p),
    "legacy-pickle": lambda p, want, other, vq: torch.save(
        ldm_level(want), p, _use_new_zipfile_serialization=False
    ),
    "safetensors": lambda p, want, other, vq: save_file(
        ldm_level(other, want), p.with_suffix(".safetensors")
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_imported_unet_of_each_file_layout_matches_golden(
    layout, unet_dev, unet_other, vq_dev, vq_file, golden, tmp_path, capsys
):
    path = tmp_path / "moe_stage0.ckpt"
    LAYOUTS[layout](path, unet_dev, unet_other, vq_dev)
    path = next(tmp_path.iterdir())
    assert run("--experts", path, "--decoder", vq_file, "-o", tmp_path / "model") == 0
    checkpoint = load_checkpoint(tmp_path / "model")
    assert checkpoint.config.unet == dataclasses.replace(UNET, space_experts=1)
    assert checkpoint.config.decoder == VQ
    data = golden("unet_w32")
    assert data.error("eps", eps_of(checkpoint.expert(0), data)) < LIMIT
    out = capsys.readouterr().out
    assert "16 space experts merged" in out
    assert ("EMA weights" in out) == (layout in ("ema-buffers-first-stage", "safetensors"))


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_space_experts_is_merged(count, unet_dev, vq_file, golden, tmp_path):
    state = keep_space_experts(unet_dev, count)
    torch.save(state, tmp_path / "model_stage0.ckpt")
    assert (
        run("--experts", tmp_path / "model_stage0.ckpt", "--decoder", vq_file, "-o", tmp_path / "model") == 0
    )
    unmerged = DenoisingUNet(dataclasses.replace(UNET, space_experts=count)).eval()
    unmerged.load_state_dict(state)
    data = golden("unet_w32")
    imported = load_checkpoint(tmp_path / "model").expert(0)
    assert relative_l2(eps_of(imported, data), eps_of(unmerged, data)) < LIMIT


@pytest.mark.parametrize(
    ("count", "ranges"),
    [
        (4, ((0, 250), (250, 500), (500, 750), (750, 1000))),
        (3, ((0, 333), (333, 666), (666, 1000))),
        (1, ((0, 1000),)),
        (0, ()),
    ],
)
def test_timesteps_are_split_evenly(count, ranges):
    assert split_timesteps(1000, count) == ranges


def test_experts_keep_the_order_of_their_files(published_weights, vq_file, tmp_path):
    paths, states = [], []
    for stage in range(4):
        states.append(keep_space_experts(tensors(published_weights("unet_w32", f"dev-stage{stage}")), 2))
        paths.append(tmp_path / f"moe_stage{stage}.ckpt")
        torch.save({"state_dict": ldm_level(states[-1])}, paths[-1])
    args = ("--decoder", vq_file, "-o", tmp_path / "model", "--scale", 8, "--name", "mine")
    assert run("--experts", *paths, *args) == 0
    checkpoint = load_checkpoint(tmp_path / "model")
    assert (checkpoint.config.scale, checkpoint.config.name) == (8, "mine")
    assert checkpoint.config.expert_ranges == split_timesteps(1000, 4)
    for k, state in enumerate(states):
        got, want = checkpoint.expert(k).state_dict(), merge_space_experts(state)
        assert all(torch.equal(got[key], want[key]) for key in want), k


def test_imported_decoder_matches_golden(unet_dev, vq_file, golden, tmp_path):
    torch.save(keep_space_experts(unet_dev, 1), tmp_path / "unet.ckpt")
    assert run("--experts", tmp_path / "unet.ckpt", "--decoder", vq_file, "-o", tmp_path / "model") == 0
    data = golden("decoder_c32")
    z, lr = torch.from_numpy(data["z"]), torch.from_numpy(data["lr_upsampled"])
    with torch.inference_mode():
        image = load_checkpoint(tmp_path / "model").decoder().decode(z, lr)
    assert data.error("image_w1", image.numpy()) < LIMIT


@pytest.mark.parametrize("one_file", [True, False], ids=["one-file", "two-files"])
def test_plain_latent_diffusion_imports(one_file, published_weights, vq_dev, tmp_path):
    unet = tensors(published_weights("ldm_unet_w32", "dev"))
    vq = {k: v for k, v in vq_dev.items() if not k.startswith(("decoder.fusion_layer_1.", "decoder.unet_1."))}
    model = decoder = tmp_path / "model.ckpt"
    training_only = {"loss.discriminator.main.0.weight": torch.ones(1)}
    if one_file:
        other = {key: torch.zeros_like(tensor) for key, tensor in unet.items()}
        torch.save({"state_dict": ldm_level(other, unet, vq | training_only)}, model)
    else:
        decoder = tmp_path / "vq-f4.ckpt"
        torch.save({"state_dict": ldm_level(unet)}, model)
        torch.save({"state_dict": vq | training_only}, decoder)
    assert run("--experts", model, "--decoder", decoder, "-o", tmp_path / "out") == 0
    checkpoint = load_checkpoint(tmp_path / "out")
    assert checkpoint.config.unet == dataclasses.replace(UNET, space_experts=0)
    assert checkpoint.config.decoder == PLAIN_VQ
    assert checkpoint.config.expert_ranges == ((0, 1000),)
    for network, want in ((checkpoint.expert(0), unet), (checkpoint.decoder(), vq)):
        got = network.state_dict()
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_kl_decoder_without_experts_imports(tmp_path, capsys):
    config = AutoencoderConfig(
        32, (1, 2, 4, 4), 2, z_channels=4, embed_dim=4, codebook_size=0, fusion_level=None
    )
    state = random_state(Autoencoder(config))
    (tmp_path / "kl-f8").mkdir()
    torch.save(state, tmp_path / "kl-f8" / "fa_vae.pth")
    assert run("--decoder", tmp_path / "kl-f8" / "fa_vae.pth", "-o", tmp_path / "model") == 0
    checkpoint = load_checkpoint(tmp_path / "model")
    assert checkpoint.config.unet is None
    assert checkpoint.config.decoder == config
    got = checkpoint.decoder().state_dict()
    assert all(torch.equal(got[key], state[key]) for key in state)
    assert "KL 4, 1/8" in capsys.readouterr().out


def test_half_precision_files_are_merged_in_float32(unet_dev, vq_file, tmp_path):
    half = {key: tensor.half() for key, tensor in keep_space_experts(unet_dev, 3).items()}
    torch.save(half, tmp_path / "unet.ckpt")
    assert run("--experts", tmp_path / "unet.ckpt", "--decoder", vq_file, "-o", tmp_path / "model") == 0
    got = load_checkpoint(tmp_path / "model").expert(0).state_dict()
    want = merge_space_experts({key: tensor.float() for key, tensor in half.items()})
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_full_width_unet_imports(published_weights, vq_file, golden, tmp_path):
    weights = tensors(published_weights("unet_w160", "dev"))
    torch.save({"state_dict": ldm_level(weights)}, tmp_path / "moe_stage0.ckpt")
    assert len(weights) == 702
    del weights
    assert run("--experts", tmp_path / "moe_stage0.ckpt", "--decoder", vq_file, "-o", tmp_path / "model") == 0
    (tmp_path / "moe_stage0.ckpt").unlink()
    checkpoint = load_checkpoint(tmp_path / "model")
    assert checkpoint.config.unet == UNetConfig(space_experts=1)
    data = golden("unet_w160")
    assert data.error("eps", eps_of(checkpoint.expert(0), data)) < LIMIT
    shutil.rmtree(tmp_path / "model")  # it takes half a gigabyte
