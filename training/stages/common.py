"""What the stages share: plain first stages, LR images, checkpoints written by one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from moesr.training import parallel
from moesr.training.checkpoint import save_checkpoint
from moesr.training.config import AutoencoderConfig, ModelConfig
from moesr.training.data import Crops, Degradation
from moesr.training.recipe import Recipe

CHECKPOINT, BEST_CHECKPOINT = "checkpoint", "checkpoint-best"


def plain(config: AutoencoderConfig) -> AutoencoderConfig:
    """The same sizes without LR fusion and refinement, which are trained later."""
    later = ("fusion_blocks", "fusion_growth", "filter_blocks", "lr_residual")
    unused = {f.name: f.default for f in dataclasses.fields(config) if f.name in later}
    return dataclasses.replace(config, fusion_level=None, refinement="none", **unused)


def first_stage_sizes(recipe: Recipe) -> AutoencoderConfig:
    """Sizes of the autoencoder that makes the latents."""
    return plain(recipe.first_stage or recipe.model.decoder)


def degradation(recipe: Recipe) -> Degradation:
    """How this recipe makes LR images."""
    return Degradation(recipe.degradation, recipe.model.scale, recipe.seed, recipe.bicubic_share)


def with_lr(data: Crops, recipe: Recipe, device_type: str) -> Crops:
    """The crops with their LR images, unless these are better made on the device: blind ones, on a GPU."""
    if recipe.degradation != "bicubic" and device_type != "cpu":
        return data
    return data.with_lr(degradation(recipe))


def cpu_state(network: nn.Module) -> dict[str, Tensor]:
    """State dict on the CPU."""
    return {k: v.detach().cpu() for k, v in network.state_dict().items()}


def publish(
    directory: Path,
    config: ModelConfig,
    experts: Iterable[dict[str, Tensor]],
    decoder: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a checkpoint directory, in place of one from an earlier run; the process 0 does."""
    if parallel.rank() == 0:
        save_checkpoint(directory, config, experts, decoder, force=True, dtype=dtype)
    parallel.wait()
