"""The decoder of an engine inside a real pipeline of diffusers, with tiny networks of random weights."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
import transformers
from autoencoders import tiny_engine

from moesr.runtime.errors import InputError
from moesr.runtime.integrations.diffusers import Decoder
from moesr.training.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return tiny_engine(tmp_path_factory.mktemp("diffusers") / "engine", encoder=False)


@pytest.fixture(scope="module")
def decoder(engine):
    found = Decoder(engine)
    yield found
    found.close()


@pytest.fixture(scope="module")
def network(engine):
    return load_checkpoint(engine.with_name("engine-checkpoint")).decoder()


def test_configuration_is_that_of_an_autoencoder(decoder):
    assert (decoder.config.scaling_factor, decoder.config["latent_channels"]) == (0.18215, 4)
    assert decoder.config.block_out_channels == (8, 8, 16, 16)
    assert decoder.config.shift_factor is None and decoder.config.force_upcast is False
    assert not hasattr(decoder.config, "other")
    assert decoder.dtype == torch.float32 and decoder.device == torch.device("cpu")


def test_decode_agrees_with_the_network(decoder, network):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = network.decode(z)
    (got,) = decoder.decode(z, return_dict=False, generator=torch.Generator())
    assert got.dtype == torch.float32
    assert torch.allclose(got, want, atol=1e-4)
    decoder.enable_tiling()
    decoder.enable_slicing()
    half = decoder.to("cpu", torch.float16).decode(z.half(), return_dict=False)[0]
    assert half.dtype == decoder.dtype == torch.float16
    assert torch.allclose(half.float(), want, atol=2e-2)
    decoder.to(dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "z", [torch.zeros(4, 8, 8), torch.zeros(1, 3, 8, 8), torch.full((1, 4, 8, 8), torch.nan)]
)
def test_wrong_latents_are_refused(decoder, z):
    with pytest.raises(InputError):
        decoder.decode(z)


def test_stable_diffusion_pipeline_decodes_with_the_engine(decoder, network):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=64
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=decoder,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    given = {
        "prompt_embeds": torch.randn(1, 77, 16),
        "negative_prompt_embeds": torch.randn(1, 77, 16),
        "latents": torch.randn(1, 4, 8, 8),
        "num_inference_steps": 2,
    }
    assert pipeline.vae is decoder and pipeline.vae_scale_factor == 8
    latent = pipeline(**given, output_type="latent").images
    image = pipeline(**given, output_type="np").images
    with torch.inference_mode():
        want = network.decode(latent / 0.18215) / 2 + 0.5
    assert image.shape == (1, 64, 64, 3)
    assert np.allclose(image[0], want[0].clamp(0, 1).permute(1, 2, 0).numpy(), atol=1e-4)
    assert image.std() > 1e-3
    assert pipeline(**given).images[0].size == (64, 64)
    output = decoder.decode(latent)
    assert isinstance(output, diffusers.models.autoencoders.vae.DecoderOutput)
