"""Stage 2: the LR-conditioned, frequency-compensated decoder (paper section 3.3), on latents from stage 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from moesr.runtime.samplers import ETA
from moesr.runtime.schedule import step_table
from moesr.training.checkpoint import Checkpoint, save_checkpoint
from moesr.training.data import Crops, resize_batch, to_float
from moesr.training.diffusion import sample
from moesr.training.loop import Run, fit
from moesr.training.losses import focal_frequency_loss
from moesr.training.networks import Autoencoder
from moesr.training.recipe import DecoderStage, Recipe
from moesr.training.stages.autoencoder import cpu_state
from moesr.training.stages.experts import condition, low_resolution

LATENTS_NAME = "latents.pt"
NEW_PARTS = ("decoder.fusion_layer_", "decoder.unet_1.")


class Triples(Crops):
    """(HR, latent) pairs of stage 2; sample `index` is one of them, drawn at random."""

    def __init__(self, data: Crops, latents: Tensor) -> None:
        super().__init__(data.paths, data.patch_px, data.seed)
        self.latents = latents

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return the HR crop, uint8 [3, P, P], and its latent [3, h, w]; the LR image follows from the crop."""
        number = int(np.random.default_rng((self.seed, index)).integers(len(self.latents)))
        return self.crop(number), self.latents[number]


class DecoderTask:
    """Reconstruct HR from stage 1's latents and the LR image; L1 plus the focal frequency loss (Eq. 6)."""

    def __init__(self, network: Autoencoder, recipe: Recipe) -> None:
        self.network, self.recipe = network, recipe
        network.requires_grad_(False)
        for name, parameter in network.named_parameters():
            parameter.requires_grad = is_trained(name, recipe.decoder)

    def loss(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """L1 and the focal frequency loss against the HR crop."""
        hr, latents = batch
        lr = low_resolution(hr.cpu(), self.recipe.model.scale)
        lr_up = to_float(resize_batch(lr, hr.shape[-1], hr.shape[-1])).to(hr.device)
        sr = self.network.decode(latents, lr_up)
        target, stage = to_float(hr), self.recipe.decoder
        l1, frequency = F.l1_loss(sr, target), focal_frequency_loss(sr, target)
        total = stage.l1_weight * l1 + stage.frequency_weight * frequency
        return total, {"l1": l1.item(), "ffl": frequency.item()}

    def after_step(self, step: int) -> None:
        """Nothing to change."""


def is_trained(name: str, stage: DecoderStage) -> bool:
    """Whether stage 2 trains the parameter `name`: the encoder and the quantiser always stay."""
    if name.startswith(NEW_PARTS):
        return True
    return stage.trainable == "decoder" and name.startswith("decoder.")


def sample_latents(checkpoint: Checkpoint, data: Crops, recipe: Recipe, run: Run, path: Path) -> Tensor:
    """Latents that stage 1 makes for crops 0..latents-1, [N, 3, h, w]; read back where they exist."""
    if path.exists():
        return torch.load(path, weights_only=True)
    model, stage = recipe.model, recipe.decoder
    table = step_table(model.schedule, stage.latent_steps, ETA[model.sampler], model.expert_ranges)
    experts = [checkpoint.expert(k).to(run.device) for k in range(len(model.expert_ranges))]
    chunks = []
    for at in tqdm(range(0, stage.latents, 16), desc="latents", unit="batch", disable=run.quiet):
        pixels = data.crops(at, min(16, stage.latents - at))
        cond = condition(low_resolution(pixels, model.scale), model.scale, model.decoder.factor)
        torch.manual_seed((recipe.seed << 32) + at)
        chunks.append(sample(list(experts), cond.to(run.device), table).cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.cat(chunks), path)
    return torch.cat(chunks)


def start_from(plain: Autoencoder, network: Autoencoder) -> None:
    """Copy the first stage's weights; the new parts start close to passing features through."""
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    foreign = [key for key in missing if not key.startswith(NEW_PARTS)]
    if unexpected or foreign:
        raise ValueError(f"the first stage does not fit the decoder: {[*unexpected, *foreign][:4]}")
    fusion = network.decoder.fusion
    if fusion is not None:
        nn.init.zeros_(fusion.encode_enc_3.conv2.weight)
    refinement = getattr(network.decoder, "unet_1", None)
    if refinement is not None:
        for block in (refinement.conv1, refinement.up_conv2):
            nn.init.dirac_(block.up_dim.weight)
            nn.init.zeros_(block.up_dim.bias)


def train(recipe: Recipe, data: Crops, run: Run, stage1: Checkpoint) -> None:
    """Train the decoder and write `run.directory/checkpoint`, the complete model."""
    latents = sample_latents(stage1, data, recipe, run, run.directory / LATENTS_NAME)
    torch.manual_seed(recipe.seed)
    network = Autoencoder(recipe.model.decoder)
    start_from(stage1.decoder(), network)
    task = DecoderTask(network, recipe)
    averaged = fit(task, recipe.decoder, Triples(data, latents), run, "decoder")
    network.load_state_dict(averaged)
    experts = (cpu_state(stage1.expert(k)) for k in range(len(recipe.model.expert_ranges)))
    save_checkpoint(run.directory / "checkpoint", recipe.model, experts, cpu_state(network), force=True)
