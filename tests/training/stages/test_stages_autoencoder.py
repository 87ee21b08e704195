"""Training of the first stage: normalization of latents, initial codebook, gradients, residual decoders."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_training as tiny
import torch

from moesr.training.checkpoint import load_checkpoint
from moesr.training.config import AutoencoderConfig
from moesr.training.data.crops import resize_batch, to_float
from moesr.training.networks import Autoencoder
from moesr.training.stages import autoencoder
from moesr.training.stages.autoencoder import (
    AutoencoderObjective,
    encode_crops,
    normalise_latents,
    prepare,
    refit_codebook,
)
from moesr.training.stages.common import plain

CONFIG = plain(tiny.recipe().model.decoder)
KL = dataclasses.replace(CONFIG, codebook_size=0)


def autoencoder_of(config: AutoencoderConfig) -> Autoencoder:
    torch.manual_seed(0)
    network = Autoencoder(config).eval()
    with torch.no_grad():  # the latents are far from unit scale
        network.quant_conv.weight.mul_(40.0)
        assert network.quant_conv.bias is not None
        network.quant_conv.bias.add_(3.0)
    return network


@pytest.mark.parametrize("config", [CONFIG, KL], ids=["vq", "kl"])
@torch.no_grad()
def test_normalised_latents_give_the_same_images(config, tmp_path):
    network, image = autoencoder_of(config), torch.rand(2, 3, 32, 32) * 2 - 1
    z = network.encode(image)
    if config.codebook_size:
        network.quantize.embedding.weight.copy_(z.permute(0, 2, 3, 1).reshape(-1, 3)[:16])
    decoded = network.decode(z)
    codes = network.quantize.indices(z) if config.codebook_size else None
    normalise_latents(network, z)
    normal = network.encode(image)
    torch.testing.assert_close(normal.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert float(normal.square().mean()) == pytest.approx(1.0, abs=1e-4)
    assert not torch.allclose(z, normal, atol=0.5)
    if codes is not None:
        assert torch.equal(network.quantize.indices(normal), codes)
        assert len(codes.unique()) > 1
    torch.testing.assert_close(network.decode(normal), decoded, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_latents_without_spread_give_finite_weights():
    network = autoencoder_of(CONFIG)
    network.quant_conv.weight.zero_()
    normalise_latents(network, network.encode(torch.zeros(1, 3, 32, 32)))
    assert all(bool(p.isfinite().all()) for p in network.parameters())


def test_codebook_starts_from_encoder_outputs():
    torch.manual_seed(0)
    objective = AutoencoderObjective(
        Autoencoder(CONFIG), tiny.recipe(autoencoder={"quantise_from": 4}).autoencoder, 4
    )
    codes = objective.network.quantize.embedding.weight
    before = codes.detach().clone()
    hr = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    batch = [torch.arange(2), hr]
    _, figures = objective.loss(batch, 2)
    assert float(figures["code"]) == 0
    objective.after_step(2)
    assert torch.equal(codes, before)
    objective.after_step(3)
    vectors = objective.network.encode(hr.float() / 127.5 - 1).permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = torch.cdist(codes, vectors).amin(dim=1)
    assert float(nearest.detach().max()) < 0.1 * float(vectors.std().detach()) and not torch.equal(
        codes, before
    )
    assert objective.loss(batch, 4)[1]["code"] > 0


def test_quantiser_passes_gradients_straight_through():
    torch.manual_seed(0)
    stage = tiny.recipe(autoencoder={"quantise_from": 0, "commitment": 0.0}).autoencoder
    objective = AutoencoderObjective(Autoencoder(CONFIG), stage, 4)
    objective.loss([torch.arange(1), torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)], 0)[
        0
    ].backward()
    for name in ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.conv_out.weight"):
        gradient = objective.network.get_parameter(name).grad
        assert gradient is not None and gradient.abs().sum() > 0, name


def test_last_and_best_checkpoint_have_latents_of_unit_scale(tmp_path):
    recipe = tiny.recipe(autoencoder={"val_every": 1, "val_samples": 1, "frequency_weight": 1.0})
    data = tiny.crops(tiny.photographs(tmp_path / "photos"))
    autoencoder.train(recipe, data, tiny.run(tmp_path / "out"), data)
    for name in ("checkpoint", "checkpoint-best"):
        loaded = load_checkpoint(tmp_path / "out" / name)
        assert loaded.config.unet is None and loaded.config.name == "tiny-autoencoder"
        z = encode_crops(loaded.decoder(), data, 6)
        assert float(z.square().mean()) == pytest.approx(1.0, abs=1e-3)


@torch.no_grad()
def test_refitted_codes_are_latents():
    network = Autoencoder(CONFIG)
    latents = 5 + torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    refit_codebook(network, latents, seed=1)
    codes = network.quantize.embedding.weight
    assert float(torch.cdist(codes, vectors).amin(dim=1).max()) == 0
    assert len(codes.unique(dim=0)) == len(codes)
    # with fewer vectors than codes, the other codes are kept
    refit_codebook(network, latents[:1, :, :1, :2], seed=1)
    assert len(codes.unique(dim=0)) >= len(codes) - 2


@torch.no_grad()
def test_lloyds_algorithm_moves_codes_to_means():
    network = Autoencoder(CONFIG)
    latents = 5 + torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    codes, errors = network.quantize.embedding.weight, []
    for steps in (0, 50):
        refit_codebook(network, latents, seed=1, lloyd_steps=steps)
        errors.append(float((network.quantize(latents) - latents).square().mean()))
    assert errors[1] < 0.8 * errors[0]
    nearest = torch.cdist(vectors, codes).argmin(dim=1)
    for k in nearest.unique():
        torch.testing.assert_close(codes[k], vectors[nearest == k].mean(dim=0))


def residual_config() -> AutoencoderConfig:
    return dataclasses.replace(CONFIG, lr_residual=True, norm_groups=0)


def test_plain_decoder_keeps_the_lr_residual_unless_fusion_follows():
    """A first stage keeps `lr_residual`. If its decoder gets LR fusion in stage 2, only stage 2 has it."""
    config = residual_config()
    assert plain(config) == config
    assert not plain(dataclasses.replace(config, fusion_level=1)).lr_residual


def test_first_stage_predicts_a_residual_of_the_lr_image(tmp_path):
    recipe = tiny.recipe(
        model={"decoder": {"lr_residual": True, "norm_groups": 0}},
        first_stage=dataclasses.asdict(residual_config()),
        decoder={"trainable": "decoder+lr"},
    )
    objective = prepare(recipe)
    image = tiny.crops(tiny.photographs(tmp_path)).crops(0, 2)
    last = objective.network.decoder.conv_out
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        _, shown = objective.evaluate((torch.arange(2), image))
    bicubic = resize_batch(resize_batch(image, 8, 8), 32, 32)
    torch.testing.assert_close(shown[..., :32], to_float(bicubic))


def test_noise_is_added_to_latents_until_the_codebook_is_used(tmp_path):
    recipe = tiny.recipe(autoencoder={"latent_noise": 0.5, "quantise_from": 2})
    objective = prepare(recipe)
    batch = torch.arange(2), tiny.crops(tiny.photographs(tmp_path)).crops(0, 2)
    objective.network.train()
    for step, differs in ((0, True), (2, False)):
        first, again = (float(objective.loss(batch, step)[0].detach()) for _ in range(2))
        assert (first != again) is differs
