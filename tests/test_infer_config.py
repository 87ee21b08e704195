"""Sizes of a network are found again in the shapes of its tensors."""

from __future__ import annotations

import pytest

from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.infer_config import infer_autoencoder_config, infer_unet_config
from moesr.training.networks import Autoencoder, DenoisingUNet
from moesr.training.weights import meta_network


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(),
        UNetConfig(space_experts=0),
        UNetConfig(64, 4, 96, (1, 2, 3), 1, (1, 4), head_channels=48, norm_groups=16, space_experts=1),
        UNetConfig(width=64, channel_mult=(1,), res_blocks=3, attention_factors=()),
        UNetConfig(width=64, channel_mult=(2, 2, 1, 1, 4), attention_factors=(2, 4, 16), space_experts=5),
    ],
    ids=["published", "ldm", "three-levels", "one-level", "five-levels"],
)
def test_unet_sizes_are_inferred(config):
    state = meta_network(DenoisingUNet, config).state_dict()
    assert infer_unet_config(state, config.head_channels, config.norm_groups) == config


@pytest.mark.parametrize(
    "config",
    [
        AutoencoderConfig(),
        AutoencoderConfig(
            channel_mult=(1, 2, 4, 4), z_channels=4, embed_dim=4, codebook_size=0, fusion_level=None
        ),
        AutoencoderConfig(
            64, (1, 1, 2, 4), 1, 4, 3, 512, 16, fusion_level=2, fusion_blocks=3, fusion_growth=8
        ),
        AutoencoderConfig(fusion_level=0, refinement="unet"),
        AutoencoderConfig(fusion_level=None, refinement="none"),
        AutoencoderConfig(filter_blocks=4),
    ],
    ids=["published", "kl-f8", "other-widths", "no-filter", "plain", "filter-blocks"],
)
def test_autoencoder_sizes_are_inferred(config):
    state = meta_network(Autoencoder, config).state_dict()
    assert infer_autoencoder_config(state, config.norm_groups) == config
