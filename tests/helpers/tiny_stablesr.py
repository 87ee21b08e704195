"""A StableSR that is small enough to train in a test, and the Stable Diffusion that it starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tiny_training as tiny
from graphs import random_network

from moesr.runtime.system.json_dataclass import build
from moesr.training.checkpoint import StableDiffusionCheckpoint, save_checkpoint
from moesr.training.config import StableDiffusionConfig, StableSRConfig
from moesr.training.networks import Autoencoder, StableSRUNet, TextEncoder
from moesr.training.recipe import Recipe, merged
from moesr.training.stages.common import plain

TINY: dict[str, Any] = {
    "model": {
        "family": "stablesr",
        "name": "tiny-stablesr",
        "unet": {
            "width": 16,
            "channel_mult": [1, 2],
            "res_blocks": 1,
            "attention_factors": [1],
            "head_channels": 8,
            "norm_groups": 8,
            "text_channels": 16,
            "structure_channels": 16,
        },
        "structure": {
            "out_channels": 16,
            "width": 16,
            "channel_mult": [1, 1],
            "res_blocks": 1,
            "attention_factors": [1],
            "heads": 2,
            "norm_groups": 8,
        },
        "text": {
            "width": 16,
            "layers": 2,
            "heads": 2,
            "vocabulary": 9,
            "tokens": 8,
            "prompt": [7, 8],
            "guided_prompt": [7, 1, 8],
            "negative_prompt": [7, 2, 3, 8],
        },
        "decoder": {
            "channels": 8,
            "channel_mult": [1, 1, 2],
            "res_blocks": 1,
            "z_channels": 4,
            "embed_dim": 4,
            "codebook_size": 0,
            "norm_groups": 4,
            "fusion_level": 1,
            "fusion_count": 2,
            "fusion_blocks": 1,
            "fusion_growth": 4,
            "refinement": "none",
        },
        "steps": 3,
    },
    "structure": {"steps": 4, "batch": 2, "patch_px": tiny.PATCH, "learning_rate": 1e-2, "ema_decay": 0.0},
    "decoder": {
        "steps": 3,
        "batch": 2,
        "accumulate": 1,
        "patch_px": tiny.PATCH,
        "learning_rate": 1e-3,
        "frequency_weight": 0.0,
        "latents": 5,
        "latent_steps": 3,
    },
}


def recipe(**changes: Any) -> Recipe:
    """Return the tiny recipe with changed entries, nested as in `structure={"steps": 5}`."""
    return build(Recipe, merged(TINY, changes), strict=True)


def stable_diffusion(directory: Path, of: Recipe) -> StableDiffusionCheckpoint:
    """Save random networks of the sizes that the recipe starts from."""
    model = of.model
    assert isinstance(model, StableSRConfig)
    config = StableDiffusionConfig(
        unet=dataclasses.replace(model.unet, structure_channels=0),
        text=model.text,
        decoder=plain(model.decoder),
        prediction=model.prediction,
    )
    unet = random_network(StableSRUNet(config.unet), 0).state_dict()
    text = random_network(TextEncoder(config.text), 1).state_dict()
    decoder = random_network(Autoencoder(config.decoder), 2).state_dict()
    saved = save_checkpoint(directory, config, [unet], decoder, others=[("text", text)], force=True)
    assert isinstance(saved, StableDiffusionCheckpoint)
    return saved
