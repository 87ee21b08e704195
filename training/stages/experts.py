"""Stage 1: the sampling experts with Space MoE (paper section 3.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moesr.training.checkpoint import Checkpoint, save_checkpoint
from moesr.training.data import Crops, resize_batch, to_float
from moesr.training.diffusion import eps_loss
from moesr.training.loop import Run, fit
from moesr.training.networks import Autoencoder, DenoisingUNet, share_expert_weights
from moesr.training.recipe import ExpertStage, Recipe
from moesr.training.stages.autoencoder import cpu_state, plain

POOL_NAME = "latents.pt"


def low_resolution(pixels: Tensor, scale: int) -> Tensor:
    """HR crops uint8 [B, 3, P, P] -> LR, uint8 [B, 3, P/scale, P/scale]."""
    side = pixels.shape[-1] // scale
    return resize_batch(pixels, side, side)


def condition(lr: Tensor, scale: int, factor: int) -> Tensor:
    """LR uint8 [B, 3, l, l] -> the condition on the latent grid, float32 in [-1, 1]."""
    side = lr.shape[-1] * scale // factor
    return to_float(lr if side == lr.shape[-1] else resize_batch(lr, side, side))


class ExpertTask:
    """Predict eps for timesteps of one range."""

    def __init__(
        self, network: DenoisingUNet, first_stage: Autoencoder, recipe: Recipe, t_range: tuple[int, int]
    ) -> None:
        self.network, self.first_stage, self.recipe, self.t_range = network, first_stage, recipe, t_range

    def loss(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error on eps over one batch: HR crops, or (latents, conditions) encoded before."""
        z, cond = (
            batch if len(batch) == 2 else encode_pair(self.first_stage, batch[0], self.recipe.model.scale)
        )
        loss = eps_loss(self.network, z, cond, self.t_range, self.recipe.model.schedule)
        return loss, {"mse": loss.item()}

    def after_step(self, step: int) -> None:
        """Expert weight sharing (Eq. 5)."""
        gamma = self.recipe.experts.gamma_at(step + 1)
        if gamma is not None:
            share_expert_weights(self.network, gamma)


@torch.no_grad()
def encode_pair(first_stage: Autoencoder, pixels: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """HR crops uint8 [B, 3, P, P] -> (latents, conditions), both [B, 3, P/f, P/f]."""
    lr = low_resolution(pixels.cpu(), scale)
    cond = condition(lr, scale, first_stage.config.factor).to(pixels.device)
    return first_stage.encode(to_float(pixels)), cond


class Pool(Dataset[tuple[Tensor, ...]]):
    """(latent, condition) pairs encoded before; sample `index` is one of them, drawn at random."""

    def __init__(self, z: Tensor, cond: Tensor, seed: int) -> None:
        self.z, self.cond, self.seed = z, cond, seed

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return latent and condition, [3, h, w] each."""
        pick = np.random.default_rng((self.seed, index)).integers(len(self.z))
        return self.z[pick], self.cond[pick]


def make_pool(first_stage: Autoencoder, data: Crops, recipe: Recipe, path: Path) -> Pool:
    """Encode `latent_pool` crops once, or read them back."""
    if path.exists():
        return Pool(**torch.load(path, weights_only=True), seed=recipe.seed)
    pairs = []
    for at in range(0, recipe.experts.latent_pool, 16):
        pairs.append(encode_pair(first_stage, data.crops(at, 16), recipe.model.scale))
    z, cond = (torch.cat(part) for part in zip(*pairs, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"z": z, "cond": cond}, path)
    return Pool(z, cond, recipe.seed)


def train(recipe: Recipe, data: Crops, run: Run, first_stage: Checkpoint) -> None:
    """Train every expert and write `run.directory/checkpoint`: experts with a plain decoder."""
    model, stage = recipe.model, recipe.experts
    assert model.unet is not None
    autoencoder = first_stage.decoder().requires_grad_(False).to(run.device)
    pool = make_pool(autoencoder, data, recipe, run.directory / POOL_NAME) if stage.latent_pool else None

    def fit_range(
        t_range: tuple[int, int], steps: int, start: dict[str, Tensor] | None, name: str
    ) -> dict[str, Tensor]:
        torch.manual_seed(recipe.seed)
        network = DenoisingUNet(model.unet)
        if start:
            network.load_state_dict(start)
        task = ExpertTask(network, autoencoder, recipe, t_range)
        part: ExpertStage = dataclasses.replace(stage, steps=steps)
        return fit(task, part, pool or data, dataclasses.replace(run, directory=run.directory / name), name)

    base = (
        fit_range((0, model.schedule.timesteps), stage.base_steps, None, "base") if stage.base_steps else None
    )
    experts = [fit_range(r, stage.steps, base, f"expert_{k}") for k, r in enumerate(model.expert_ranges)]
    config = dataclasses.replace(model, decoder=plain(model.decoder))
    save_checkpoint(run.directory / "checkpoint", config, experts, cpu_state(autoencoder), force=True)
