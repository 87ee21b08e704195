"""Sizes of every network of the model, as frozen dataclasses that travel inside a checkpoint as JSON.

One family covers the published MoE-SR models (x4 and x8), plain latent diffusion (one expert, no Space MoE,
plain VQ decoder), a decoder on its own (Stable Diffusion 1.5's KL autoencoder with a refinement network) and
anything smaller. The defaults are the published full size (paper Table 7, with the channel multipliers that
give its Table 6).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from moesr.runtime.errors import UsageError
from moesr.runtime.schedule import Schedule


@dataclass(frozen=True)
class UNetConfig:
    """Denoising UNet of one sampling expert (paper section 3.2)."""

    in_channels: int = 6  # z_t and the condition, stacked
    out_channels: int = 3  # eps
    width: int = 160
    channel_mult: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 2  # residual blocks a level
    attention_factors: tuple[int, ...] = (8,)  # attention where the latent is downsampled by these
    head_channels: int = 32
    norm_groups: int = 32
    space_experts: int = 16  # FFN experts after each attention block; 1 = merged, 0 = no Space MoE

    @property
    def factor(self) -> int:
        """Latent sides must be multiples of this many pixels."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class AutoencoderConfig:
    """First stage with the frequency-compensated decoder (paper section 3.3)."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4)
    res_blocks: int = 2
    z_channels: int = 3
    embed_dim: int = 3
    codebook_size: int = 8192  # 0: a KL autoencoder without a quantiser
    norm_groups: int = 32
    fusion_level: int | None = 1  # decoder level that is fused with LR features; None: not LR-conditioned
    fusion_blocks: int = 2  # RRDBs in the fusion layer
    fusion_growth: int = 32
    refinement: Literal["aff", "unet", "none"] = "aff"  # "unet": the ablation without the frequency filter
    filter_blocks: int = 8  # blocks of the AFF filter's block-diagonal layers

    @property
    def factor(self) -> int:
        """Pixels of the image a latent pixel stands for, along one side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: sampling experts, decoder, schedule and the range of timesteps of each expert."""

    name: str = "moesr-x4"
    scale: int = 4
    unet: UNetConfig | None = field(default_factory=UNetConfig)  # None: a decoder on its own
    decoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    schedule: Schedule = field(default_factory=Schedule)
    expert_ranges: tuple[tuple[int, int], ...] = ((0, 250), (250, 500), (500, 750), (750, 1000))
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    steps: int = 50

    @property
    def tile_multiple(self) -> int:
        """Output pixels that a tile's or a patch's side must be a multiple of."""
        latent = self.decoder.factor * (self.unet.factor if self.unet else 1)
        # the refinement network halves the image twice, and its real DFT needs an even width
        return latent if self.decoder.refinement == "none" else math.lcm(latent, 8)

    def __post_init__(self) -> None:
        edges = [0, *(t_to for _, t_to in self.expert_ranges)]
        contiguous = all(r == (a, b) for r, a, b in zip(self.expert_ranges, edges, edges[1:], strict=False))
        if self.unet and not (contiguous and edges[-1] == self.schedule.timesteps):
            raise UsageError(
                f"expert ranges {self.expert_ranges} must follow one another from 0 to "
                f"{self.schedule.timesteps} (lowest noise first); correct expert_ranges in the configuration"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as `moesr.runtime.records.build` reads them."""
        return dataclasses.asdict(self)
