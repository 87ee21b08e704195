"""Plain latent diffusion from published files to an image, compared with its algorithm in plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_l2
from PIL import Image
from published_files import ldm_level, random_state, tensors
from published_files import run as import_published
from weights_of_names import weights

from moesr.export.cli import main as moesr_export
from moesr.runtime import Upscaler
from moesr.runtime.cli.doctor import main as moesr_doctor
from moesr.runtime.cli.run import main as moesr_run
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.sampling import noise
from moesr.runtime.sampling.schedule import Schedule
from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet
from moesr.training.weights import state_shapes

TILE, SEED, STEPS = 32, 42, 4
SCALE_FACTOR = 0.8  # of the latents, as in a model that was trained with latents of unit variance
ROOTS = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64)
UNET = UNetConfig(width=16, res_blocks=1, head_channels=16, norm_groups=8, space_experts=0)
VQ = AutoencoderConfig(
    16, res_blocks=1, codebook_size=256, norm_groups=8, fusion_level=None, refinement="none"
)


@pytest.fixture(scope="module")
def states() -> list[dict[str, torch.Tensor]]:
    """Weights of the UNet and of the plain autoencoder, seeded by their published names."""
    networks = DenoisingUNet(UNET), Autoencoder(VQ)
    return [tensors(weights(state_shapes(network.state_dict()), "dev")) for network in networks]


@pytest.fixture(scope="module")
def engine(states, tmp_path_factory) -> Path:
    """An engine of one published file with raw and EMA weights, its own schedule and scaled latents."""
    folder, (unet, vq) = tmp_path_factory.mktemp("ldm"), states
    raw = {key: torch.zeros_like(tensor) for key, tensor in unet.items()}
    facts = {"betas": (ROOTS**2).float(), "scale_factor": torch.tensor(SCALE_FACTOR)}
    torch.save({"state_dict": ldm_level(raw, unet, vq) | facts, "epoch": 7}, folder / "model.ckpt")
    both = "--experts", folder / "model.ckpt", "--decoder", folder / "model.ckpt"
    sizes = "--head-channels", UNET.head_channels, "--norm-groups", UNET.norm_groups
    assert import_published(*both, *sizes, "-o", folder / "ldm", "--quiet") == 0
    export = [str(folder / "ldm"), "-o", str(folder / "engine"), "--tile", str(TILE), "--quiet"]
    assert moesr_export(export) == 0
    return folder / "engine"


@torch.inference_mode()
def reference(states, lr: np.ndarray, eta: float) -> np.ndarray:
    """Upscale one tile, uint16 [8, 8, 3], with latent diffusion's DDIM sampler: float64 [H, W, 3], 0 to 1."""
    unet, autoencoder = DenoisingUNet(UNET).eval(), Autoencoder(VQ).eval()
    unet.load_state_dict(states[0])
    autoencoder.load_state_dict(states[1])
    cond = torch.from_numpy(lr.transpose(2, 0, 1)[None] / 32767.5 - 1.0).float()
    alphas_cumprod = torch.cumprod(1.0 - ROOTS**2, 0)
    timesteps = list(range(0, 1000, 1000 // STEPS))
    shape = tuple(cond.shape[1:])
    z = torch.from_numpy(noise.gaussian(SEED, noise.INITIAL_NOISE, shape))[None].double()
    for i in reversed(range(STEPS)):
        a = alphas_cumprod[timesteps[i] + 1]
        a_prev = alphas_cumprod[timesteps[i - 1] + 1] if i else alphas_cumprod[0]
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        eps = unet(z.float(), cond, torch.tensor([timesteps[i] + 1])).double()
        x0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        added = torch.from_numpy(noise.gaussian(SEED, STEPS - 1 - i, shape))[None]
        z = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * eps + sigma * added
    image = autoencoder.decode((z / SCALE_FACTOR).float())[0]
    return (image.double().clamp(-1, 1).numpy().transpose(1, 2, 0) + 1) / 2


def test_manifest_holds_the_facts_of_the_file(engine):
    manifest = read_manifest(engine)
    assert manifest.name == "ldm-x4" and manifest.scale == 4 and manifest.latent_factor == 4
    assert manifest.schedule == Schedule(1000, 0.0015, 0.0195)
    assert (manifest.prediction, manifest.condition, manifest.init) == ("eps", "image", "noise")
    assert manifest.sampler == "ddpm"  # DDIM with eta 1
    assert manifest.expert_ranges == ((0, 1000),) and manifest.graphs.keys() == {"expert_0", "decoder"}
    assert [spec.name for spec in manifest.graphs["decoder"].inputs] == ["z"]
    assert manifest.model["unet"]["space_experts"] == 0


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 1.0), ("ddim", 0.0)])
def test_loop_matches_the_algorithm(sampler, eta, engine, states):
    lr = np.random.default_rng(1).integers(0, 1 << 16, (8, 8, 3), np.uint16)
    with Upscaler(engine, threads=1) as up:
        sr = up(lr, sampler=sampler, steps=STEPS, seed=SEED, color_fix="none")
    assert relative_l2(sr / 65535, reference(states, lr, eta)) < 1e-4


def test_moesr_run_and_doctor_take_the_engine(engine, tmp_path, capsys):
    lr = np.random.default_rng(2).integers(0, 256, (10, 12, 3), np.uint8)
    Image.fromarray(lr).save(tmp_path / "lr.png")
    run = [str(tmp_path / "lr.png"), "--engine", str(engine), "--steps", "2", "--threads", "1"]
    assert moesr_run([*run, "--start-step", "1", "-o", str(tmp_path / "sr.png")]) == 0
    with Upscaler(engine, threads=1) as up, Image.open(tmp_path / "sr.png") as sr:
        np.testing.assert_array_equal(np.asarray(sr), up(lr, steps=2, start_step=1))
    assert moesr_run([*run, "--fidelity", "0.5", "-o", str(tmp_path / "none.png")]) == 2
    assert "the decoder of ldm-x4 takes no features of the LR image" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()
    assert moesr_doctor(["--engine", str(engine)]) == 0


@pytest.mark.slow
def test_full_width_model_becomes_an_engine(tmp_path):
    """The published sizes; the paper rounds the parameters to 113.62 and 55.33 million."""
    unet = DenoisingUNet(UNetConfig(space_experts=0))
    vq = Autoencoder(AutoencoderConfig(fusion_level=None, refinement="none"))
    counts = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (unet, vq)]
    assert counts == pytest.approx([113.62, 55.33], rel=2e-4)
    weights = {key: 0.1 * tensor for key, tensor in random_state(unet).items()}
    torch.save({"state_dict": ldm_level(weights, None, random_state(vq))}, tmp_path / "model.ckpt")
    del unet, vq, weights
    both = "--experts", tmp_path / "model.ckpt", "--decoder", tmp_path / "model.ckpt"
    assert import_published(*both, "-o", tmp_path / "ldm", "--quiet") == 0
    (tmp_path / "model.ckpt").unlink()
    export = [str(tmp_path / "ldm"), "-o", str(tmp_path / "engine"), "--tile", "64", "--quiet"]
    assert moesr_export(export) == 0
    with Upscaler(tmp_path / "engine", threads=1) as up:
        assert up(np.zeros((16, 16, 3), np.uint8), steps=2).shape == (64, 64, 3)
