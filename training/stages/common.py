"""Functions that the stages share: first stages, LR images, and writing of checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from moesr.runtime.errors import UsageError
from moesr.training.checkpoint import Checkpoint, save_checkpoint
from moesr.training.config import AutoencoderConfig, ModelConfig
from moesr.training.data.crops import Crops, Degradation
from moesr.training.loop import distributed
from moesr.training.loop.fit import Run
from moesr.training.networks import Autoencoder
from moesr.training.recipe import Recipe

CHECKPOINT, BEST_CHECKPOINT = "checkpoint", "checkpoint-best"


def plain(config: AutoencoderConfig) -> AutoencoderConfig:
    """Return the sizes without LR fusion and refinement, which stage 2 adds.

    `lr_residual` is kept if there is no LR fusion: it then belongs to the first stage itself.
    """
    later = ["fusion_count", "fusion_blocks", "fusion_growth", "filter_blocks"]
    later += [] if config.fusion_level is None else ["lr_residual"]
    unused = {f.name: f.default for f in dataclasses.fields(config) if f.name in later}
    return dataclasses.replace(config, fusion_level=None, refinement="none", **unused)


def first_stage_sizes(recipe: Recipe) -> AutoencoderConfig:
    """Return the sizes of the autoencoder that makes the latents."""
    return plain(recipe.first_stage or recipe.model.decoder)


def first_stage_of(recipe: Recipe, start: Checkpoint, run: Run) -> Autoencoder:
    """Load the autoencoder of a checkpoint and freeze it; UsageError if its sizes are not the recipe's."""
    sizes = first_stage_sizes(recipe)
    if plain(start.config.decoder) != sizes:
        raise UsageError(
            f"{start.directory}: its autoencoder has other sizes than the recipe's; use the "
            "recipe it was trained with"
        )
    network = Autoencoder(sizes)
    own = network.state_dict()
    network.load_state_dict({k: v for k, v in start.decoder().state_dict().items() if k in own})
    return network.requires_grad_(False).eval().to(run.device)


def degradation(recipe: Recipe) -> Degradation:
    """Return the degradation with which this recipe makes LR images."""
    return Degradation(recipe.degradation, recipe.model.scale, recipe.seed, recipe.bicubic_share)


def with_lr(data: Crops, recipe: Recipe, device_type: str) -> Crops:
    """Make the crops yield LR images, except for blind degradation on a GPU, where the stage makes them."""
    if recipe.degradation != "bicubic" and device_type != "cpu":
        return data
    return data.with_lr(degradation(recipe))


def cpu_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a network on the CPU."""
    return {k: v.detach().cpu() for k, v in network.state_dict().items()}


def publish(
    directory: Path,
    config: ModelConfig,
    experts: Iterable[dict[str, Tensor]],
    decoder: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    others: Iterable[tuple[str, dict[str, Tensor]]] = (),
) -> None:
    """Write a checkpoint directory, replacing one from an earlier run. Only process 0 writes."""
    if distributed.rank() == 0:
        save_checkpoint(directory, config, experts, decoder, others=others, force=True, dtype=dtype)
    distributed.wait()
