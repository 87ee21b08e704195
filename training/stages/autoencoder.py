"""The first stage: a VQ autoencoder whose latents have unit scale.

The published first stage comes from VQGAN (Esser et al. 2020); this trains one of any size with L1, the
codebook losses and, if asked for, the focal frequency and color losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moesr.training.config import ModelConfig, VaeConfig
from moesr.training.data.crops import Crops, resize_batch, to_float
from moesr.training.loop import distributed
from moesr.training.loop.fit import Run, fit
from moesr.training.loop.validation import psnr
from moesr.training.losses.losses import frequency_loss, pixel_loss
from moesr.training.networks import Autoencoder
from moesr.training.recipe import AutoencoderStage, Recipe
from moesr.training.stages.common import BEST_CHECKPOINT, CHECKPOINT, cpu_state, first_stage_sizes, publish
from moesr.training.stages.start import keep_scale

SCALE_CROPS = 256  # crops whose latents set the scale of the latent space


class AutoencoderObjective:
    """Reconstruct crops through the quantiser, with straight-through gradients."""

    critic = None

    def __init__(self, network: Autoencoder, stage: AutoencoderStage, scale: int) -> None:
        self.network, self.stage, self.scale = network, stage, scale
        self._latents: Tensor | None = None

    def loss(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the pixel, codebook, commitment and frequency losses, and the figures to log."""
        image = to_float(batch[1])
        z = self.network.encode(image)
        self._latents = z.detach()
        return self._losses(image, z, quantised=step >= self.stage.quantise_from)[:2]

    def _losses(
        self, image: Tensor, z: Tensor, *, quantised: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the loss, its figures and the reconstruction of `image` from its latents `z`."""
        net, stage = self.network, self.stage
        codebook = z.new_zeros(())
        if quantised and net.config.codebook_size:
            codes = net.quantize(z.detach())
            codebook = F.mse_loss(codes, z.detach()) + stage.commitment * F.mse_loss(z, codes.detach())
            z = z + (codes - z).detach()
        elif stage.latent_noise and net.training:
            z = z + stage.latent_noise * z.detach().std() * torch.randn_like(z)
        decoded = net.decoder(net.post_quant_conv(z), {}, 1.0)
        if net.config.lr_residual:
            decoded = decoded + enlarged_lr(image, self.scale)
        figures = {"code": codebook}
        total = codebook + pixel_loss(decoded, image, stage, figures)
        return total + frequency_loss(decoded, image, stage, figures), figures, decoded

    def after_step(self, step: int) -> None:
        """Set the codebook from encoder outputs before the first step with quantization."""
        net = self.network
        if step + 1 == self.stage.quantise_from and net.config.codebook_size and self._latents is not None:
            latents = distributed.gather(self._latents.float())
            vectors = latents.permute(0, 2, 3, 1).reshape(-1, net.config.embed_dim)
            codes = net.quantize.embedding.weight
            picks = torch.randint(len(vectors), (len(codes),)).to(vectors.device)
            jitter = torch.randn(codes.shape).to(vectors.device)
            codes.data.copy_(vectors[picks] + 0.01 * vectors.std() * jitter)

    def evaluate(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss with quantization, the PSNR in dB, and the crops beside their reconstructions."""
        image = to_float(batch[1])
        total, _, decoded = self._losses(image, self.network.encode(image), quantised=True)
        return {"loss": total, "psnr": psnr(decoded, image)}, torch.cat((decoded, image), dim=-1)


def enlarged_lr(image: Tensor, scale: int) -> Tensor:
    """Reduce images [B, 3, P, P] in [-1, 1] by `scale` and enlarge them, both bicubic and in 8 bits."""
    pixels = ((image + 1.0) * 127.5).round().byte()
    side = image.shape[-1]
    return to_float(resize_batch(resize_batch(pixels, side // scale, side // scale), side, side))


@torch.no_grad()
def normalise_latents(network: Autoencoder, latents: Tensor) -> None:
    """Shift and scale the latent space so that `latents` [N, D, h, w] have zero mean and unit variance.

    Nearest codes and decoded images do not change: all channels have the same scale, and the adjacent layers
    absorb it. Latents with zero variance are only shifted.
    """
    latents = latents.to(network.quant_conv.weight.device)
    mean = latents.mean(dim=(0, 2, 3))
    scale = (latents - mean[:, None, None]).square().mean().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    d, quant, post = len(mean), network.quant_conv, network.post_quant_conv
    assert quant.bias is not None and post.bias is not None
    quant.bias[:d] = (quant.bias[:d] - mean) / scale
    quant.weight[:d] /= scale
    if network.config.codebook_size:
        codes = network.quantize.embedding.weight
        codes.copy_((codes - mean) / scale)
    post.bias += (post.weight * mean[:, None, None]).sum(dim=(1, 2, 3))
    post.weight *= scale


@torch.no_grad()
def refit_codebook(network: Autoencoder, latents: Tensor, seed: int, lloyd_steps: int = 0) -> None:
    """Replace the codes by as many vectors drawn from `latents` [N, D, h, w], so that no code is unused.

    A codebook that was set from few crops covers only the latents of these crops. The decoder gets other
    codes than before, but they are closer to the latents. Steps of Lloyd's algorithm then move each code to
    the mean of its nearest latents, which also covers rare latents such as those of strong edges.
    """
    codes = network.quantize.embedding.weight
    latents = latents.to(codes.device)
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(vectors), generator=generator)[: len(codes)]
    codes[: len(picks)] = vectors[picks.to(codes.device)]
    for _ in range(lloyd_steps):
        nearest = torch.cat([network.quantize.indices(part) for part in latents.split(8)])
        sums = torch.zeros_like(codes).index_add_(0, nearest, vectors)
        counts = torch.bincount(nearest, minlength=len(codes))
        used = counts > 0
        codes[used] = sums[used] / counts[used, None]


def encode_crops(network: Autoencoder, data: Crops, count: int, batch: int = 16) -> Tensor:
    """Encode crops 0..count-1 without quantization: latents [count, D, h, w] on the CPU."""
    device = next(network.parameters()).device
    with torch.inference_mode():
        chunks = [
            network.encode(to_float(data.crops(at, min(batch, count - at)).to(device)))
            for at in range(0, count, batch)
        ]
    return torch.cat(chunks).cpu()


def prepare(recipe: Recipe) -> AutoencoderObjective:
    """Build the objective of this stage with newly initialized weights."""
    torch.manual_seed(recipe.seed)
    network = Autoencoder(first_stage_sizes(recipe))
    if not network.config.norm_groups:
        keep_scale(network)
    return AutoencoderObjective(network, recipe.autoencoder, recipe.model.scale)


def train(recipe: Recipe, data: Crops, run: Run, held_out: Crops | None = None) -> None:
    """Train the first stage and write `run.directory/checkpoint`, a decoder-only checkpoint."""
    stage, config = recipe.autoencoder, first_stage_sizes(recipe)
    fitted = fit(prepare(recipe), stage, data, run, "autoencoder", held_out)
    name = f"{recipe.model.name}-autoencoder"
    model = ModelConfig(name=name, scale=recipe.model.scale, unet=None, decoder=config)
    if isinstance(recipe.model, VaeConfig):  # its latents are normalized below and need no scaling factor
        model = VaeConfig(name=name, decoder=config, latent_scale=1.0)
    for place, weights in ((CHECKPOINT, fitted.last), (BEST_CHECKPOINT, fitted.best)):
        if weights is not None:
            network = Autoencoder(config).to(run.device).eval()
            network.load_state_dict(weights)
            crops = min(SCALE_CROPS, max(1, stage.steps * stage.batch))
            latents = encode_crops(network, data, crops)
            if stage.refit_codebook and config.codebook_size:
                refit_codebook(network, latents, recipe.seed, stage.lloyd_steps)
            normalise_latents(network, latents)
            publish(run.directory / place, model, [], cpu_state(network))
