"""The denoising UNet of one sampling expert, with Space MoE (paper section 3.2).

Module and parameter names are those of the published checkpoints: these load by key, without renames.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesr.training.networks.space_moe import SpaceMoE

if TYPE_CHECKING:
    from moesr.training.config import UNetConfig


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of timesteps `t` [B] as [B, dim], cosines first."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * freqs[None]
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=1)


class ResBlock(nn.Module):
    """Residual block with an added timestep embedding: [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # dropout in the published layout, rate 0
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return the block's output for features `x` and embedding `emb` [B, emb_channels]."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the H*W tokens, residual."""

    def __init__(self, channels: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        b, c, height, width = x.shape
        tokens = x.reshape(b, c, height * width)
        qkv = self.qkv(self.norm(tokens)).reshape(b, self.heads, 3, c // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(2)  # [B, heads, tokens, head_channels] each
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, -1)
        return (tokens + self.proj_out(h)).reshape(b, c, height, width)


class Downsample(nn.Module):
    """Halve the sides with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.op(x)


class Upsample(nn.Module):
    """Double the sides by nearest neighbour, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimestepSequential(nn.Sequential):
    """A sequence whose residual blocks also take the timestep embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        """Run the layers in order."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class DenoisingUNet(nn.Module):
    """Predict eps from z_t, the condition and the timestep (paper Eq. 2)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, groups = config.width, config.norm_groups
        emb = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        def attention(channels: int) -> list[nn.Module]:
            block: list[nn.Module] = [AttentionBlock(channels, config.head_channels, groups)]
            if config.space_experts:
                block.append(SpaceMoE(channels, config.space_experts))
            return block

        self.input_blocks = nn.ModuleList(
            [TimestepSequential(nn.Conv2d(config.in_channels, width, 3, padding=1))]
        )
        skips, channels = [width], width
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.res_blocks):
                layers: list[nn.Module] = [ResBlock(channels, mult * width, emb, groups)]
                channels = mult * width
                layers += attention(channels) if 2**level in config.attention_factors else []
                self.input_blocks.append(TimestepSequential(*layers))
                skips.append(channels)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(TimestepSequential(Downsample(channels)))
                skips.append(channels)

        self.middle_block = TimestepSequential(
            ResBlock(channels, channels, emb, groups),
            *attention(channels),
            ResBlock(channels, channels, emb, groups),
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for block in range(config.res_blocks + 1):
                layers = [ResBlock(channels + skips.pop(), mult * width, emb, groups)]
                channels = mult * width
                layers += attention(channels) if 2**level in config.attention_factors else []
                if level and block == config.res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(TimestepSequential(*layers))

        out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        nn.init.zeros_(out.weight)
        self.out = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), out)

    def forward(self, z_t: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        """Return eps [B, 3, h, w] for latents `z_t` and condition `cond`, both of that shape, and `t` [B].

        h and w must be multiples of `config.factor`.
        """
        emb = self.time_embed(timestep_embedding(t, self.config.width))
        h, skips = torch.cat((z_t, cond), dim=1), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat((h, skips.pop()), dim=1), emb)
        return self.out(h)
