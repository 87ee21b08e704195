"""UNets of the latent diffusion family, including a sampling expert's with Space MoE (paper section 3.2).

Module and parameter names are those of the published checkpoints, which therefore load without renaming.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesr.training.networks import operators
from moesr.training.networks.operators import NormSiLU
from moesr.training.networks.space_moe import SpaceMoE

if TYPE_CHECKING:
    from moesr.training.config import StructureConfig, UNetConfig

HalfSizes = TypeVar("HalfSizes", bound="UNetConfig | StructureConfig")
Sizes = TypeVar("Sizes", bound="UNetConfig")


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of timesteps `t` [B] as [B, dim], cosines first."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * freqs[None]
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=1)


@dataclass(frozen=True)
class Conditions:
    """Inputs of the layers of a UNet besides the features."""

    emb: Tensor  # timestep embedding, [B, 4 * width]
    structure: Mapping[int, Tensor] = field(default_factory=dict)  # LR features [B, C, h, w] by their width w
    text: Tensor | None = None  # [B or 1, tokens, C]


class ConditionedLayer(nn.Module):
    """A layer that takes `Conditions` as its second input."""


class ResBlock(ConditionedLayer):
    """Residual block with an added timestep embedding: [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, groups: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.in_layers = NormSiLU(
            nn.GroupNorm(groups, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = NormSiLU(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # in place of a dropout of rate 0 in the published layout
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, given: Conditions) -> Tensor:
        """Return the block's output [B, out, H, W] for features `x` [B, in, H, W]."""
        return self.skip_connection(x) + self.residual(x, given)

    def residual(self, x: Tensor, given: Conditions) -> Tensor:
        """Return what the block adds to its (projected) input, [B, out, H, W]."""
        return self.out_layers(self.in_layers(x) + self.emb_layers(given.emb)[:, :, None, None])


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
        qkv = self.qkv(operators.group_norm(tokens[..., None], self.norm)[..., 0])
        h = operators.packed_attention(qkv.reshape(b, self.heads, 3, c // self.heads, -1))
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
    """Double the sides by nearest-neighbor interpolation, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimestepSequential(nn.Sequential):
    """A sequence of layers; those that are a `ConditionedLayer` also take the `Conditions`."""

    def forward(self, x: Tensor, given: Conditions) -> Tensor:  # type: ignore[override]
        """Run the layers in order."""
        for layer in self:
            x = layer(x, given) if isinstance(layer, ConditionedLayer) else layer(x)
        return x


class HalfUNet(nn.Module, Generic[HalfSizes]):
    """The down levels of a UNet and its middle block."""

    def __init__(self, config: HalfSizes) -> None:
        super().__init__()
        self.config = config
        width, emb = config.width, 4 * config.width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList(
            [TimestepSequential(nn.Conv2d(config.in_channels, width, 3, padding=1))]
        )
        self.skip_channels, channels = [width], width  # output channels of every input block
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.res_blocks):
                layers: list[nn.Module] = [self.res_block(channels, mult * width)]
                channels = mult * width
                layers += self.attention(channels) if 2**level in config.attention_factors else []
                self.input_blocks.append(TimestepSequential(*layers))
                self.skip_channels.append(channels)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(TimestepSequential(Downsample(channels)))
                self.skip_channels.append(channels)
        self.middle_block = TimestepSequential(
            self.res_block(channels, channels), *self.attention(channels), self.res_block(channels, channels)
        )

    def res_block(self, in_channels: int, out_channels: int) -> ResBlock:
        """Return a residual block of this family of networks."""
        return ResBlock(in_channels, out_channels, 4 * self.config.width, self.config.norm_groups)

    def attention(self, channels: int) -> list[nn.Module]:
        """Return the layers that attend to all positions."""
        raise NotImplementedError

    def embed(self, t: Tensor) -> Tensor:
        """Timesteps [B] -> embeddings [B, 4 * width]."""
        return self.time_embed(timestep_embedding(t, self.config.width))


class UNet(HalfUNet[Sizes]):
    """A whole UNet: the up levels also take the features of the down levels."""

    def __init__(self, config: Sizes) -> None:
        super().__init__(config)
        self.output_blocks = nn.ModuleList()
        skips, channels = list(self.skip_channels), self.skip_channels[-1]
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for block in range(config.res_blocks + 1):
                layers: list[nn.Module] = [self.res_block(channels + skips.pop(), mult * config.width)]
                channels = mult * config.width
                layers += self.attention(channels) if 2**level in config.attention_factors else []
                if level and block == config.res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(TimestepSequential(*layers))

        out = nn.Conv2d(config.width, config.out_channels, 3, padding=1)
        nn.init.zeros_(out.weight)
        self.out = NormSiLU(nn.GroupNorm(config.norm_groups, config.width), nn.SiLU(), out)

    def run(self, x: Tensor, given: Conditions) -> Tensor:
        """[B, in_channels, h, w] -> [B, out_channels, h, w]; h, w multiples of `config.factor`."""
        h, skips = self._descend(x, given, self.input_blocks)
        return self.out(self._ascend(self.middle_block(h, given), skips, given, self.output_blocks))

    def deep(self, x: Tensor, given: Conditions, blocks: int) -> Tensor:
        """Run all but the last `blocks` output blocks; returns the features that these blocks start from."""
        h, skips = self._descend(x, given, self.input_blocks)
        return self._ascend(self.middle_block(h, given), skips, given, self.output_blocks[:-blocks])

    def run_shallow(self, x: Tensor, given: Conditions, blocks: int, deep: Tensor) -> Tensor:
        """`run` from the result of `deep`: only the last `blocks` output blocks and their input blocks."""
        _, skips = self._descend(x, given, self.input_blocks[:blocks])
        return self.out(self._ascend(deep, skips, given, self.output_blocks[-blocks:]))

    def _descend(
        self, h: Tensor, given: Conditions, blocks: Iterable[nn.Module]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run input blocks; returns the features after the last block, and those after each block."""
        skips = []
        for block in blocks:
            h = block(h, given)
            skips.append(h)
        return h, skips

    def _ascend(
        self, h: Tensor, skips: list[Tensor], given: Conditions, blocks: Iterable[nn.Module]
    ) -> Tensor:
        """Run output blocks, each of which removes and uses the last entry of `skips`."""
        for block in blocks:
            h = block(torch.cat((h, skips.pop()), dim=1), given)
        return h


class DenoisingUNet(UNet["UNetConfig"]):
    """Predict eps from z_t, the condition and the timestep (paper Eq. 2)."""

    def attention(self, channels: int) -> list[nn.Module]:
        """Return an attention block followed by a Space MoE layer, if the model has one."""
        config = self.config
        block: list[nn.Module] = [AttentionBlock(channels, config.head_channels, config.norm_groups)]
        if config.space_experts:
            block.append(SpaceMoE(channels, config.space_experts))
        return block

    def forward(self, z_t: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        """Return eps [B, 3, h, w] for latents `z_t` and condition `cond`, both of that shape, and `t` [B].

        h and w must be multiples of `config.factor`.
        """
        return self.run(torch.cat((z_t, cond), dim=1), Conditions(self.embed(t)))
