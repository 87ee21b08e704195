"""The first stage: a VQ autoencoder whose latents have unit scale.

The published first stage comes from VQGAN (Esser et al. 2020); this trains one of any size with L1, the codebook
losses and, if asked for, the focal frequency loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesr.training.checkpoint import save_checkpoint
from moesr.training.config import AutoencoderConfig, ModelConfig
from moesr.training.data import Crops, to_float
from moesr.training.loop import Run, fit
from moesr.training.losses import focal_frequency_loss
from moesr.training.networks import Autoencoder
from moesr.training.recipe import AutoencoderStage, Recipe


def plain(config: AutoencoderConfig) -> AutoencoderConfig:
    """The same sizes without LR fusion and refinement, which are trained later."""
    return dataclasses.replace(config, fusion_level=None, refinement="none")


class AutoencoderTask:
    """Reconstruct crops through the quantiser, with straight-through gradients."""

    def __init__(self, network: Autoencoder, stage: AutoencoderStage) -> None:
        self.network, self.stage = network, stage
        self._latents: Tensor | None = None

    def loss(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """L1, codebook and commitment losses, and the focal frequency loss where its weight is not 0."""
        net, stage = self.network, self.stage
        image = to_float(batch[0])
        z = net.encode(image)
        self._latents = z.detach()
        codebook = z.new_zeros(())
        if step >= stage.quantise_from and net.config.codebook_size:
            codes = net.quantize(z.detach())
            codebook = F.mse_loss(codes, z.detach()) + stage.commitment * F.mse_loss(z, codes.detach())
            z = z + (codes - z).detach()
        decoded = net.decoder(net.post_quant_conv(z), None, 1.0)
        l1 = F.l1_loss(decoded, image)
        frequency = focal_frequency_loss(decoded, image) if stage.frequency_weight else l1.new_zeros(())
        total = stage.l1_weight * l1 + stage.frequency_weight * frequency + codebook
        return total, {"l1": l1.item(), "ffl": frequency.item(), "code": codebook.item()}

    def after_step(self, step: int) -> None:
        """Set the codebook from encoder outputs when the quantiser comes into use."""
        net = self.network
        if step + 1 == self.stage.quantise_from and net.config.codebook_size and self._latents is not None:
            vectors = self._latents.permute(0, 2, 3, 1).reshape(-1, net.config.embed_dim)
            codes = net.quantize.embedding.weight
            picks = torch.randint(len(vectors), (len(codes),))
            codes.data.copy_(vectors[picks] + 0.01 * vectors.std() * torch.randn(codes.shape))


@torch.no_grad()
def normalise_latents(network: Autoencoder, latents: Tensor) -> None:
    """Shift and scale the latent space so that `latents` [N, D, h, w] have zero mean and unit variance.

    Exact: nearest codes and decoded images do not change, since one scale serves all channels and the layers on both
    sides absorb it.
    """
    mean = latents.mean(dim=(0, 2, 3))
    scale = (latents - mean[:, None, None]).square().mean().sqrt()
    d = len(mean)
    network.quant_conv.bias[:d] = (network.quant_conv.bias[:d] - mean) / scale
    network.quant_conv.weight[:d] /= scale
    if network.config.codebook_size:
        codes = network.quantize.embedding.weight
        codes.copy_((codes - mean) / scale)
    post = network.post_quant_conv
    post.bias += (post.weight * mean[:, None, None]).sum(dim=(1, 2, 3))
    post.weight *= scale


def encode_crops(network: Autoencoder, data: Crops, count: int, batch: int = 16) -> Tensor:
    """Latents of crops 0..count-1, before quantisation: [count, D, h, w] on the CPU."""
    device = next(network.parameters()).device
    with torch.inference_mode():
        chunks = [
            network.encode(to_float(data.crops(at, min(batch, count - at)).to(device)))
            for at in range(0, count, batch)
        ]
    return torch.cat(chunks).cpu()


def train(recipe: Recipe, data: Crops, run: Run) -> None:
    """Train the first stage and write `run.directory/checkpoint`, a decoder-only checkpoint."""
    stage, config = recipe.autoencoder, plain(recipe.model.decoder)
    torch.manual_seed(recipe.seed)
    network = Autoencoder(config)
    averaged = fit(AutoencoderTask(network, stage), stage, data, run, "autoencoder")
    network.load_state_dict(averaged)
    normalise_latents(network.eval(), encode_crops(network, data, min(256, stage.steps)))
    model = ModelConfig(
        name=f"{recipe.model.name}-autoencoder", scale=recipe.model.scale, unet=None, decoder=config
    )
    save_checkpoint(run.directory / "checkpoint", model, [], cpu_state(network), force=True)


def cpu_state(network: nn.Module) -> dict[str, Tensor]:
    """State dict on the CPU."""
    return {k: v.detach().cpu() for k, v in network.state_dict().items()}
