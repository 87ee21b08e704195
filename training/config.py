"""Sizes of every network of the model, as frozen dataclasses that travel inside a checkpoint as JSON.

One family covers the published MoE-SR models (x4 and x8), plain latent diffusion (one expert, no Space MoE,
plain VQ decoder), a decoder on its own (Stable Diffusion 1.5's KL autoencoder with a refinement network) and
anything smaller. The defaults are the published full size (paper Table 7, with the channel multipliers that
give its Table 6).
"""

from __future__ import annotations

import dataclasses
import types
import typing
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
    norm_groups: int = 32  # 0: no normalisation outside the refinement, so that levels are kept
    fusion_level: int | None = 1  # decoder level that is fused with LR features; None: not LR-conditioned
    fusion_blocks: int = 2  # RRDBs in the fusion layer
    fusion_growth: int = 32
    refinement: Literal["aff", "unet", "none"] = "aff"  # "unet": the ablation without the frequency filter
    filter_blocks: int = 8  # blocks of the AFF filter's block-diagonal layers
    lr_residual: bool = False  # the decoder makes what the LR image lacks, and the two are added

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

    def __post_init__(self) -> None:
        edges = [0, *(t_to for _, t_to in self.expert_ranges)]
        contiguous = all(r == (a, b) for r, a, b in zip(self.expert_ranges, edges, edges[1:], strict=False))
        if self.unet and not (contiguous and edges[-1] == self.schedule.timesteps):
            raise UsageError(
                f"expert ranges {self.expert_ranges} must follow one another from 0 to "
                f"{self.schedule.timesteps} (lowest noise first); correct expert_ranges in the configuration"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from JSON values; a `UsageError` names an unknown entry or one of the wrong type."""
        return build(cls, values)


def build(kind: Any, value: Any, where: str = "config") -> Any:
    """Build `kind` (a dataclass, tuple, optional, literal or scalar type) from JSON `value`.

    Missing entries take their defaults; an unknown entry or a wrong type raises `UsageError` naming its path.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind) if f.init}
        if not isinstance(value, dict):
            raise UsageError(f"{where}: got {value!r}; expected entries among {sorted(known)}")
        if unknown := sorted(set(value) - known):
            raise UsageError(f"{where}: unknown entries {unknown}; expected entries among {sorted(known)}")
        entries = {k: build(hints[k], v, f"{where}.{k}") for k, v in value.items()}
        try:
            return kind(**entries)  # type: ignore[operator]
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return build(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        item_kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(item_kinds) == len(value):
            return tuple(
                build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(item_kinds, value, strict=True))
            )
    if origin is Literal and value in args:
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise UsageError(f"{where}: got {value!r}, expected {getattr(kind, '__name__', kind)}")
