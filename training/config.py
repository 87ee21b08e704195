"""Sizes of every network of the model, as frozen dataclasses that travel inside a checkpoint as JSON.

`ModelConfig` covers the published MoE-SR models (x4 and x8), plain latent diffusion (one expert, no Space
MoE, plain VQ decoder), a decoder on its own and anything smaller. `StableSRConfig` is StableSR: Stable
Diffusion 2.1 (`StableDiffusionConfig`) with a structure encoder. `VaeConfig` is the autoencoder of a
text-to-image model, such as Stable Diffusion 1.5's with a refinement network. The defaults are the published
full sizes (MoE-SR's paper, Table 7, with the channel multipliers that give its Table 6).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from moesr.runtime.errors import UsageError
from moesr.runtime.sampling.samplers import SAMPLERS, Prediction
from moesr.runtime.sampling.schedule import Schedule
from moesr.runtime.system.json_dataclass import Range


@dataclass(frozen=True)
class Length:
    """The inclusive range of the number of entries of a list, declared like `Range`."""

    low: int
    high: int

    def refusal(self, value: tuple[Any, ...]) -> str | None:
        """Describe the allowed lengths if `value` has too few or too many entries; None if it does not."""
        fits = self.low <= len(value) <= self.high
        return None if fits else f"a list of {self.low} to {self.high} entries"


# The ranges of all numbers of a configuration. They are far wider than any published model needs: they keep a
# damaged file from describing a network that cannot be built.
Channels = Annotated[int, Range(1, 1 << 16)]
Blocks = Annotated[int, Range(1, 64)]
Heads = Annotated[int, Range(1, 1 << 12)]  # also for groups and blocks of channels
Experts = Annotated[int, Range(0, 1 << 8)]
Level = Annotated[int, Range(0, 9)]
Scale = Annotated[int, Range(1, 64)]
Steps = Annotated[int, Range(1, 1 << 16)]
Tile = Annotated[int, Range(8, 1 << 14)]
LatentScale = Annotated[float, Range(1e-6, 1e6)]
Multipliers = Annotated[tuple[Annotated[int, Range(1, 64)], ...], Length(1, 10)]
Factors = Annotated[tuple[Annotated[int, Range(1, 1 << 10)], ...], Length(0, 10)]
Timestep = Annotated[int, Range(0, 1 << 16)]
ExpertRanges = Annotated[tuple[tuple[Timestep, Timestep], ...], Length(0, 64)]
Tokens = Annotated[tuple[Annotated[int, Range(0, 1 << 24)], ...], Length(2, 1 << 12)]

START_TOKEN, END_TOKEN = 49406, 49407  # in CLIP's vocabulary


def prompt_ids(words: str) -> tuple[int, ...]:
    """Return a prompt's token ids: the start token, the ids in the text `words`, and the end token."""
    return (START_TOKEN, *map(int, words.split()), END_TOKEN)


EMPTY_PROMPT = prompt_ids("")

POSITIVE_PROMPT = prompt_ids(
    "263 12066 281 273 2361 263 949 3027 281 273 2361 263 16157 281 273 2361 263 1070 3143 281 273 264"
)
"""(masterpiece:2), (best quality:2), (realistic:2), (very clear:2)"""

NEGATIVE_PROMPT = prompt_ids(
    "274 323 267 7651 267 6469 267 17622 267 263 5719 3027 281 273 2361 263 1042 3027 281 273 264"
)
"""3d, cartoon, anime, sketches, (worst quality:2), (low quality:2)"""


@dataclass(frozen=True)
class UNetConfig:
    """Denoising UNet of one sampling expert (paper section 3.2)."""

    in_channels: Channels = 6  # z_t and the condition, stacked
    out_channels: Channels = 3  # eps
    width: Channels = 160
    channel_mult: Multipliers = (1, 2, 2, 4)
    res_blocks: Blocks = 2  # residual blocks per level
    attention_factors: Factors = (8,)  # there is attention at the levels downsampled by these factors
    head_channels: Channels = 32
    norm_groups: Heads = 32
    space_experts: Experts = 16  # FFN experts after each attention block; 1 = merged, 0 = no Space MoE

    @property
    def factor(self) -> int:
        """Sides of the latent must be multiples of this number of latent pixels."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class AutoencoderConfig:
    """First stage with the frequency-compensated decoder (paper section 3.3)."""

    channels: Channels = 128
    channel_mult: Multipliers = (1, 2, 4)
    res_blocks: Blocks = 2
    z_channels: Channels = 3
    embed_dim: Channels = 3
    codebook_size: Annotated[int, Range(0, 1 << 24)] = 8192  # 0: a KL autoencoder without a quantizer
    norm_groups: Annotated[int, Range(0, 1 << 12)] = (
        32  # 0: no normalization outside the refinement network, so that absolute levels are kept
    )
    fusion_level: Level | None = 1  # first decoder level fused with LR features; None: not LR-conditioned
    fusion_count: Blocks = 1  # number of fused levels: `fusion_level` and the next lower resolutions
    fusion_blocks: Blocks = 2  # RRDBs in the fusion layer
    fusion_growth: Channels = 32
    refinement: Literal["aff", "unet", "none"] = "aff"  # "unet": the ablation without the frequency filter
    filter_blocks: Heads = 8  # blocks of the AFF filter's block-diagonal layers
    lr_residual: bool = False  # the decoder predicts a residual that is added to the enlarged LR image

    @property
    def fusion_levels(self) -> tuple[int, ...]:
        """Decoder levels that are fused with LR features, highest resolution first."""
        level = self.fusion_level
        return () if level is None else tuple(range(level, level + self.fusion_count))

    @property
    def takes_lr(self) -> bool:
        """Whether the decoder reads the LR image, for its features or to add its residual to it."""
        return self.lr_residual or self.fusion_level is not None

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: sampling experts, decoder, schedule and the range of timesteps of each expert."""

    name: str = "moesr-x4"
    scale: Scale = 4
    unet: UNetConfig | None = field(default_factory=UNetConfig)  # None: a decoder on its own
    decoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    schedule: Schedule = field(default_factory=Schedule)
    expert_ranges: ExpertRanges = ((0, 250), (250, 500), (500, 750), (750, 1000))
    sampler: str = "ddpm"  # one of SAMPLERS
    steps: Steps = 50
    prediction: Prediction = "eps"  # the experts' output
    fidelity: Annotated[float, Range(0, 1)] = 1.0  # default weight of the LR features in the decoder

    @property
    def tile_multiple(self) -> int:
        """Sides of tiles and of training patches must be multiples of this number of output pixels."""
        latent = self.decoder.factor * (self.unet.factor if self.unet else 1)
        # The refinement network halves the image twice, and its real DFT needs an even width after that.
        return latent if self.decoder.refinement == "none" else math.lcm(latent, 8)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UsageError(f"sampler is {self.sampler!r}, expected one of {', '.join(SAMPLERS)}")
        edges = [0, *(t_to for _, t_to in self.expert_ranges)]
        contiguous = all(r == (a, b) for r, a, b in zip(self.expert_ranges, edges, edges[1:], strict=False))
        if self.unet and not (contiguous and edges[-1] == self.schedule.timesteps):
            raise UsageError(
                f"expert ranges {self.expert_ranges} must follow one another from 0 to "
                f"{self.schedule.timesteps} (lowest noise first); correct expert_ranges in the configuration"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as `moesr.runtime.system.json_dataclass.build` reads them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class StableSRUNetConfig(UNetConfig):
    """StableSR's denoising UNet: the UNet of Stable Diffusion 2.1, modulated by structure features."""

    in_channels: Channels = 4
    out_channels: Channels = 4
    width: Channels = 320
    channel_mult: Multipliers = (1, 2, 4, 4)
    attention_factors: Factors = (1, 2, 4)
    head_channels: Channels = 64
    space_experts: Experts = 0
    text_channels: Channels = 1024
    structure_channels: Annotated[int, Range(0, 1 << 16)] = 256  # 0: not modulated, as in Stable Diffusion


@dataclass(frozen=True)
class StructureConfig:
    """StableSR's time-aware encoder of the LR latent."""

    in_channels: Channels = 4
    out_channels: Channels = 256  # channels of the features of every resolution
    width: Channels = 256
    channel_mult: Multipliers = (1, 1, 2, 2)
    res_blocks: Blocks = 2
    attention_factors: Factors = (1, 2, 4)
    heads: Heads = 4
    norm_groups: Heads = 32


@dataclass(frozen=True)
class TextConfig:
    """The text tower of OpenCLIP's ViT-H/14, and the prompts that a model is used with.

    Prompts are token ids, including the start and the end token; the network pads them with 0.
    """

    width: Channels = 1024
    layers: Blocks = 24  # stored layers; the last one is not run
    heads: Heads = 16
    vocabulary: Annotated[int, Range(1, 1 << 24)] = 49408
    tokens: Annotated[int, Range(2, 1 << 12)] = 77
    prompt: Tokens = EMPTY_PROMPT
    guided_prompt: Tokens = POSITIVE_PROMPT  # used with guidance, together with `negative_prompt`
    negative_prompt: Tokens = NEGATIVE_PROMPT


CFW_AUTOENCODER = AutoencoderConfig(
    channel_mult=(1, 2, 4, 4),
    z_channels=4,
    embed_dim=4,
    codebook_size=0,
    fusion_level=1,
    fusion_count=2,
    refinement="none",
)
"""Stable Diffusion's KL autoencoder with StableSR's controllable feature wrapping at two levels."""

KL_AUTOENCODER = dataclasses.replace(CFW_AUTOENCODER, fusion_level=None, fusion_count=1)
"""Stable Diffusion's KL autoencoder without feature wrapping."""

KL_F8 = dataclasses.replace(KL_AUTOENCODER, refinement="aff")
"""The KL autoencoder of Stable Diffusion 1.5 with the refinement network (MoE-SR, appendix D)."""

STABLE_DIFFUSION = Schedule(beta_start=0.00085, beta_end=0.012, spacing="linspace")


@dataclass(frozen=True)
class StableDiffusionConfig(ModelConfig):
    """Stable Diffusion 2, the text-to-image model that StableSR is trained on top of."""

    family: Literal["stable-diffusion"] = "stable-diffusion"
    name: str = "stable-diffusion"
    scale: Scale = 1
    unet: StableSRUNetConfig = StableSRUNetConfig(structure_channels=0)
    decoder: AutoencoderConfig = KL_AUTOENCODER
    schedule: Schedule = STABLE_DIFFUSION
    expert_ranges: ExpertRanges = ((0, 1000),)
    text: TextConfig = field(default_factory=TextConfig)
    prediction: Prediction = "eps"
    latent_scale: LatentScale = 0.18215  # latents of the UNet are the autoencoder's times this

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = self.unet.text_channels, self.unet.out_channels
        given = self.text.width, self.decoder.embed_dim
        if wanted != given:
            raise UsageError(
                f"{self.name}: the channels of text and latent are {given}, the UNet expects "
                f"{wanted}; correct the configuration"
            )


@dataclass(frozen=True)
class VaeConfig(ModelConfig):
    """The KL autoencoder of a text-to-image model, with or without the refinement network.

    It has no LR image, no sampler and no experts, so those entries of a model are fixed and not stored.
    """

    family: Literal["autoencoder"] = "autoencoder"
    name: str = "kl-f8"
    decoder: AutoencoderConfig = KL_F8
    latent_scale: LatentScale = 0.18215  # latents of the text-to-image model are the autoencoder's times this
    encoder: bool = True  # False: the weights are those of the decoder alone
    scale: Scale = field(default=1, init=False)
    unet: UNetConfig | None = field(default=None, init=False)
    schedule: Schedule = field(default_factory=Schedule, init=False)
    expert_ranges: ExpertRanges = field(default=(), init=False)
    sampler: str = field(default="ddim", init=False)
    steps: Steps = field(default=1, init=False)
    prediction: Prediction = field(default="eps", init=False)
    fidelity: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder.codebook_size or self.decoder.takes_lr:
            raise UsageError(
                f"{self.name}: has a codebook or takes an LR image, expected a KL autoencoder on its own; "
                "correct the configuration"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values without the entries that are fixed."""
        stored = {entry.name for entry in dataclasses.fields(self) if entry.init}
        return {name: value for name, value in super().to_dict().items() if name in stored}


@dataclass(frozen=True)
class StableSRConfig(ModelConfig):
    """StableSR: one UNet for all timesteps, conditioned on a text and on the structure of the LR latent."""

    family: Literal["stablesr"] = "stablesr"
    name: str = "stablesr-x4"
    unet: StableSRUNetConfig = field(default_factory=StableSRUNetConfig)
    decoder: AutoencoderConfig = CFW_AUTOENCODER
    schedule: Schedule = STABLE_DIFFUSION
    expert_ranges: ExpertRanges = ((0, 1000),)
    steps: Steps = 200
    structure: StructureConfig = field(default_factory=StructureConfig)
    text: TextConfig = field(default_factory=TextConfig)
    prediction: Prediction = "eps"
    init: Literal["noise", "latent"] = "latent"  # sampling starts from noise or from the noised LR latent
    tile: Tile = 512  # side of the training images, output pixels
    latent_scale: LatentScale = 0.18215  # latents of the UNet are the autoencoder's times this
    fidelity: Annotated[float, Range(0, 1)] = 0.5  # default weight of the LR features in the decoder

    def __post_init__(self) -> None:
        super().__post_init__()
        unet, levels = self.unet, len(self.unet.channel_mult)
        wanted = unet.structure_channels, levels, unet.text_channels, unet.out_channels
        structure, z = self.structure, self.decoder.embed_dim
        given = structure.out_channels, len(structure.channel_mult), self.text.width, z
        if wanted != given:
            raise UsageError(
                f"{self.name}: channels and levels of the structure encoder, channels of the text and of the "
                f"latent are {given}, the UNet expects {wanted}; correct the configuration"
            )
