"""First stage: encoder, quantiser and LR-conditioned, frequency-compensated decoder (paper section 3.3).

Module and parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesr.training.networks import operators
from moesr.training.networks.fusion import FusionLayer, ResnetBlock, group_norm
from moesr.training.networks.refinement import RefinementUNet

if TYPE_CHECKING:
    from moesr.training.config import AutoencoderConfig

LOG_VARIANCE = (-30.0, 20.0)  # bounds of the posterior's log-variance


class AttnBlock(nn.Module):
    """Single-head self-attention over all H*W positions, residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        h = operators.group_norm(x, self.norm)
        return x + operators.spatial_attention(h, self.q, self.k, self.v, self.proj_out)


class Downsample(nn.Module):
    """Halve the sides by a strided convolution, padded right and bottom only as in the published network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides by nearest-neighbor interpolation, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, with an optional resampling layer after them."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the residual blocks without the resampling layer."""
        for block in self.block:
            x = block(x)
        return x


class Encoder(nn.Module):
    """Image to latent, or to the LR features that the decoder fuses."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        ch, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = ch
        for i, mult in enumerate(config.channel_mult):
            level = Level(channels, mult * ch, config.res_blocks, groups)
            channels = mult * ch
            if i < len(config.channel_mult) - 1:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = Middle(channels, groups)
        self.norm_out = group_norm(channels, groups)
        z = config.z_channels if config.codebook_size else 2 * config.z_channels  # KL: mean and log-variance
        self.conv_out = nn.Conv2d(channels, z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] -> latent moments [B, z, H/f, W/f]."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            downsample = getattr(level, "downsample", None)
            h = h if downsample is None else downsample(h)
        return self.conv_out(operators.group_norm(self.mid(h), self.norm_out, silu=True))

    def features(self, x: Tensor, levels: tuple[int, ...]) -> dict[int, Tensor]:
        """Image [B, 3, H, W] -> features [B, C, H/2^i, W/2^i] after the blocks of each i of `levels`."""
        h, found = self.conv_in(x), {}
        for i in range(max(levels) + 1):
            h = self.down[i](h if i == 0 else self.down[i - 1].downsample(h))  # type: ignore[operator]
            if i in levels:
                found[i] = h
        return found


class Decoder(nn.Module):
    """Latent to image, fused with LR features at some levels and refined in the frequency domain."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        ch, groups = config.channels, config.norm_groups
        self.fusion_levels = config.fusion_levels
        channels = config.channel_mult[-1] * ch
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, groups)
        levels: list[Level] = []
        for i, mult in reversed(list(enumerate(config.channel_mult))):
            level = Level(channels, mult * ch, config.res_blocks + 1, groups)
            channels = mult * ch
            if i > 0:
                level.upsample = Upsample(channels)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        for i in config.fusion_levels:
            fused = config.channel_mult[i] * ch
            fusion = FusionLayer(fused, groups, config.fusion_blocks, config.fusion_growth)
            self.add_module(f"fusion_layer_{i}", fusion)
        if config.refinement != "none":
            blocks = config.filter_blocks if config.refinement == "aff" else None
            self.unet_1 = RefinementUNet(channels, groups, blocks)
        self.norm_out = group_norm(channels, groups)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    @property
    def fusions(self) -> dict[int, FusionLayer]:
        """The layers that fuse LR features, by level; empty if the decoder is not LR-conditioned."""
        return {i: getattr(self, f"fusion_layer_{i}") for i in self.fusion_levels}

    def forward(
        self, z: Tensor, lr_features: Mapping[int, Tensor], fidelity: Tensor | float, refined: bool = True
    ) -> Tensor:
        """Latent [B, z, h, w] -> image [B, 3, f*h, f*w].

        `lr_features` holds the features to fuse, by level; `fidelity` scales them. Without `refined` the
        refinement network is left out.
        """
        h = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            h = self.up[i](h)
            if i in lr_features:
                h = self.fusions[i](lr_features[i], h, fidelity)
            if i > 0:
                h = self.up[i].upsample(h)  # type: ignore[operator]
        if refined and hasattr(self, "unet_1"):
            h = self.unet_1(h)
        return self.conv_out(operators.group_norm(h, self.norm_out, silu=True))


class VectorQuantiser(nn.Module):
    """Nearest-code quantiser of VQGAN (Esser et al. 2020)."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0, 1.0)

    def indices(self, z: Tensor) -> Tensor:
        """Latents [B, D, h, w] -> the index of the nearest code, [B*h*w], in row-major order."""
        return operators.nearest_code(z, self.embedding.weight)

    def forward(self, z: Tensor) -> Tensor:
        """Latents [B, D, h, w] -> the nearest codes, same shape."""
        b, d, h, w = z.shape
        codes = self.embedding(self.indices(z)).reshape(b, h, w, d).permute(0, 3, 1, 2)
        # Evaluation keeps the channels-last strides of the published decoder, because torch's GroupNorm sums
        # in memory order and another order changes the image by 4e-5 at 512 px. Training uses the faster
        # layout.
        return codes.contiguous() if self.training else codes


class Autoencoder(nn.Module):
    """VQ (or KL) autoencoder with the frequency-compensated decoder."""

    def __init__(self, config: AutoencoderConfig, *, encodes: bool = True) -> None:
        """Make the network; without `encodes` it has no encoder and can only decode."""
        super().__init__()
        self.config = config
        if encodes:
            self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        z_out = config.embed_dim if config.codebook_size else 2 * config.embed_dim
        z_in = config.z_channels if config.codebook_size else 2 * config.z_channels
        if config.codebook_size:
            self.quantize = VectorQuantiser(config.codebook_size, config.embed_dim)
        if encodes:
            self.quant_conv = nn.Conv2d(z_in, z_out, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] -> latent [B, D, H/f, W/f] before quantisation (KL: the mean)."""
        return self.quant_conv(self.encoder(image))[:, : self.config.embed_dim]

    def sample(self, image: Tensor, noise: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1], noise [B, D, H/f, W/f] -> a sample of the posterior (KL)."""
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE)) * noise

    def lr_features(self, lr: Tensor) -> dict[int, Tensor]:
        """LR image in the output size [B, 3, H, W] in [-1, 1] -> the features that the decoder fuses."""
        levels = self.config.fusion_levels
        return self.encoder.features(lr, levels) if levels else {}

    def decode(
        self,
        z: Tensor,
        lr: Tensor | None = None,
        fidelity: Tensor | float = 1.0,
        *,
        quantised: bool = False,
        refined: bool = True,
    ) -> Tensor:
        """Latent [B, D, h, w] -> image [B, 3, f*h, f*w] in about [-1, 1].

        `lr` [B, 3, f*h, f*w] is the LR image resized to the output size, required by an LR-conditioned
        decoder. `fidelity` in [0, 1] is StableSR's trade-off between fidelity and realism; the published
        model uses 1. With `quantised` set, the latents are codes already and are not quantized again.
        Without `refined` the refinement network is left out.
        """
        if self.config.codebook_size and not quantised:
            z = self.quantize(z)
        features = {} if lr is None else self.lr_features(lr)
        image = self.decoder(self.post_quant_conv(z), features, fidelity, refined)
        return image + lr if self.config.lr_residual and lr is not None else image


class DecoderOnly(Autoencoder):
    """An autoencoder of which only the decoder is there."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config, encodes=False)
