"""The sizes of a network are inferred from the shapes of its tensors."""

from __future__ import annotations

import pytest

from moesr.training.config import (
    CFW_AUTOENCODER,
    AutoencoderConfig,
    StableSRUNetConfig,
    StructureConfig,
    TextConfig,
    UNetConfig,
)
from moesr.training.importing.infer_config import (
    infer_autoencoder_config,
    infer_stablesr_unet_config,
    infer_structure_config,
    infer_text_config,
    infer_unet_config,
)
from moesr.training.networks import Autoencoder, DenoisingUNet, StableSRUNet, StructureEncoder, TextEncoder
from moesr.training.weights import CheckpointError, meta_network


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
        CFW_AUTOENCODER,
        AutoencoderConfig(channel_mult=(1, 1, 2, 2), fusion_level=0, fusion_count=3),
    ],
    ids=[
        "published",
        "kl-f8",
        "other-widths",
        "no-filter",
        "plain",
        "filter-blocks",
        "two-levels",
        "three-levels",
    ],
)
def test_autoencoder_sizes_are_inferred(config):
    state = meta_network(Autoencoder, config).state_dict()
    assert infer_autoencoder_config(state, config.norm_groups) == config


@pytest.mark.parametrize(
    "config",
    [
        StableSRUNetConfig(),
        StableSRUNetConfig(
            8,
            6,
            96,
            (1, 2, 3),
            1,
            (2,),
            head_channels=48,
            norm_groups=16,
            text_channels=40,
            structure_channels=8,
        ),
    ],
    ids=["published", "three-levels"],
)
def test_stablesr_unet_sizes_are_inferred(config):
    state = meta_network(StableSRUNet, config).state_dict()
    assert infer_stablesr_unet_config(state, config.head_channels, config.norm_groups) == config


@pytest.mark.parametrize(
    ("config", "head_channels"),
    [(StructureConfig(), 64), (StructureConfig(3, 48, 96, (1, 2, 3), 1, (4,), heads=3, norm_groups=16), 32)],
    ids=["published", "three-levels"],
)
def test_structure_encoder_sizes_are_inferred(config, head_channels):
    state = meta_network(StructureEncoder, config).state_dict()
    assert infer_structure_config(state, head_channels, config.norm_groups) == config


@pytest.mark.parametrize(
    "config", [TextConfig(), TextConfig(width=64, layers=2, heads=4, vocabulary=100, tokens=9)], ids=str
)
def test_text_encoder_sizes_are_inferred(config):
    state = meta_network(TextEncoder, config).state_dict()
    assert infer_text_config(state, config.width // config.heads) == config


def test_heads_must_divide_the_channels():
    text = meta_network(TextEncoder, TextConfig(width=64, layers=1, heads=4)).state_dict()
    with pytest.raises(CheckpointError, match="64 channels has no heads of 48"):
        infer_text_config(text, 48)
