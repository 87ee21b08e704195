"""Training recipes: a model's sizes and how its stages are trained, as frozen dataclasses read from JSON.

A recipe is a file or the name of a preset beside this module. It may name another one as its `base` and hold
only what differs. Defaults are the paper's (Tables 7 and 8), except that the terms of stage 2 that need
other networks (LPIPS, adversarial) are off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from moesr.runtime.errors import UsageError
from moesr.runtime.system.json_dataclass import build
from moesr.training.config import AutoencoderConfig, ModelConfig, StableSRConfig


@dataclass(frozen=True)
class StageConfig:
    """What every stage has in common."""

    steps: int = 100_000
    batch: int = 9  # samples in memory at once, in each process
    accumulate: int = 1  # batches a step
    patch_px: int = 512  # side of the HR crop
    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    decay: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    ema_decay: float = 0.9999
    clip_norm: float = 0.0  # 0: gradients are not clipped
    precision: Literal["fp32", "bf16"] = "fp32"
    save_every: int = 1000
    val_every: int = 1000
    val_samples: int = 16

    def check(self, name: str) -> None:
        """Raise UsageError where an entry of this stage, called `name`, is out of range."""
        least = dict.fromkeys(
            ("batch", "accumulate", "patch_px", "save_every", "val_every", "val_samples"), 1
        )
        for entry, low in {**least, "steps": 0, "warmup_steps": 0}.items():
            _check(f"{name}.{entry}", getattr(self, entry), low)
        for entry in ("learning_rate", "clip_norm"):
            _check(f"{name}.{entry}", getattr(self, entry), 0.0)
        for entry, value in (("ema_decay", self.ema_decay), *(("betas", b) for b in self.betas)):
            _check(f"{name}.{entry}", value, 0.0, below=1.0)


def _check(key: str, value: float, low: float, high: float = math.inf, below: float = math.inf) -> None:
    """Raise UsageError unless low <= value <= high and value < below."""
    if not (low <= value <= high and value < below):
        limits = f"{low} to {high}" if high < math.inf else f"at least {low}"
        limits += f" and less than {below}" if below < math.inf else ""
        raise UsageError(f"{key} is {value}, expected {limits}; correct the recipe")


@dataclass(frozen=True)
class AutoencoderStage(StageConfig):
    """The first stage: a plain VQ autoencoder, trained without GAN or LPIPS terms."""

    l1_weight: float = 1.0
    mse_weight: float = 0.0
    frequency_weight: float = 0.0
    color_weight: float = 0.0  # L1 between means over 8x8 pixels, where a narrow network loses hues
    gradient_weight: float = 0.0  # one minus the gradient magnitude similarity
    commitment: float = 0.25
    refit_codebook: bool = False  # at the end, draw the codes anew from encoder outputs
    lloyd_steps: int = 0  # of Lloyd's algorithm after that, so that rare latents have codes of their own
    latent_noise: float = 0.0  # before the codebook is in use: deviation added, as a share of the latents'
    quantise_from: int = 0  # step at which the codebook is set from encoder outputs and comes into use


@dataclass(frozen=True)
class ExpertStage(StageConfig):
    """Stage 1 of the paper: the sampling experts."""

    accumulate: int = 2
    base_steps: int = 0  # steps of one network on all timesteps, from which every expert then starts
    sharing: Literal["none", "constant", "ramp"] = "constant"  # expert weight sharing (Eq. 5)
    gamma: float = 0.999  # constant sharing
    ramp_to: float = 0.3  # ramp: 1 - gamma rises linearly from 0 to this ...
    ramp_steps: int = 10_000  # ... over this many steps
    offset_noise: float = 0.0  # deviation of a constant in each channel's noise, so that means are learnt
    latent_pool: int = 0  # crops encoded once and drawn from again; 0: every crop is new

    def check(self, name: str) -> None:
        """Raise UsageError where an entry of this stage, called `name`, is out of range."""
        super().check(name)
        for entry in ("gamma", "ramp_to", "offset_noise"):
            _check(f"{name}.{entry}", getattr(self, entry), 0.0, 1.0)
        for entry, low in (("ramp_steps", 1), ("base_steps", 0), ("latent_pool", 0)):
            _check(f"{name}.{entry}", getattr(self, entry), low)

    def gamma_at(self, step: int) -> float | None:
        """Momentum of Eq. 5 after `step` finished steps, or None without sharing."""
        if self.sharing == "none":
            return None
        if self.sharing == "constant":
            return self.gamma
        return 1.0 - self.ramp_to * min(1.0, step / self.ramp_steps)


@dataclass(frozen=True)
class DecoderStage(StageConfig):
    """Stage 2 of the paper: the frequency-compensated decoder."""

    steps: int = 50_000
    batch: int = 1
    accumulate: int = 4
    learning_rate: float = 1e-4
    l1_weight: float = 1.0
    mse_weight: float = 0.0
    frequency_weight: float = 10.0  # lambda of Eq. 6
    color_weight: float = 0.0  # as for the autoencoder
    gradient_weight: float = 0.0  # as for the autoencoder
    # Of the triples, whose latent is the encoder's of the original. Fidelity w is then drawn so that a sample
    # with w has the encoder's latent with probability 1 - w, else a sampled one: w says how far to trust it.
    encoded_share: float = 0.0
    free_share: float = 0.0  # of the samples, which are decoded with fidelity 0 (encoded_share: with 0 or 1)
    energy_weight: float = 0.0  # of these samples: local energy of detail, wherever it lies
    spectrum_weight: float = 0.0  # of all samples: the shape of the log power spectrum
    wavelet_colors: bool = False  # compare images after the wavelet color correction, but for color_weight
    lpips_weight: float = 0.0
    lpips_weights: str = ""  # file of torchvision's VGG16, for LPIPS
    adversarial_weight: float = 0.0
    adversarial_scaling: Literal["adaptive", "fixed"] = "adaptive"  # adaptive: times VQGAN's own weight
    adversarial_from: int = 0  # step at which the decoder begins to see the discriminator
    # "decoder+lr" also trains the encoder's levels, from a start that passes LR colors: for narrow networks,
    # whose encoder keeps no hues. The encoder then serves LR images only, no longer the first stage.
    trainable: Literal["fusion+refinement", "decoder", "decoder+lr"] = "fusion+refinement"
    init_share: float = 0.0  # of the weights of --init in those that are published: network interpolation
    stored: Literal["fp32", "fp16"] = "fp32"  # weights of the published model, experts included
    latents: int = 100_000  # (LR, latent, HR) triples made by stage 1
    latent_steps: int = 200  # sampler steps for them
    latent_batch: int = 16  # latents sampled together

    def check(self, name: str) -> None:
        """Raise UsageError where an entry of this stage, called `name`, is out of range."""
        super().check(name)
        for entry in ("latents", "latent_steps", "latent_batch"):
            _check(f"{name}.{entry}", getattr(self, entry), 1)
        for entry in ("init_share", "free_share", "encoded_share"):
            _check(f"{name}.{entry}", getattr(self, entry), 0.0, 1.0)


@dataclass(frozen=True)
class Augmentation:
    """How crops differ from what photographs show, beyond flips and transposition; all off by default.

    Few photographs are learnt by heart without it: their textures, not what textures have in common.
    """

    shuffle_channels: bool = False  # an order of red, green and blue for every crop: every hue
    smallest_size: float = 1.0  # photographs are made smaller by a factor between this and 1
    least_contrast: float = 1.0  # differences from a crop's mean color are multiplied by this to 1
    candidates: int = 1  # places drawn in a photograph, of which the one with most detail is taken

    def __post_init__(self) -> None:
        _check("augmentation.smallest_size", self.smallest_size, 0.1, 1.0)
        _check("augmentation.least_contrast", self.least_contrast, 0.0, 1.0)
        _check("augmentation.candidates", self.candidates, 1)


@dataclass(frozen=True)
class Recipe:
    """A model and how to train it."""

    model: ModelConfig | StableSRConfig = field(default_factory=ModelConfig)
    # Of the latents, where stage 2 trains another network to decode them, with trainable "decoder+lr".
    first_stage: AutoencoderConfig | None = None
    degradation: Literal["bicubic", "blind", "mild"] = "bicubic"
    bicubic_share: float = 0.0  # of the samples of a blind recipe, which are degraded by bicubic alone
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    experts: ExpertStage = field(default_factory=ExpertStage)
    structure: StageConfig = field(default_factory=StageConfig)  # StableSR's stage 1
    decoder: DecoderStage = field(default_factory=DecoderStage)

    def __post_init__(self) -> None:
        if self.first_stage is not None:
            self._check_first_stage(self.first_stage)
        _check("seed", self.seed, 0)
        _check("bicubic_share", self.bicubic_share, 0.0, 1.0)
        self.autoencoder.check("autoencoder")
        self.experts.check("experts")
        self.structure.check("structure")
        self.decoder.check("decoder")
        tile = math.lcm(self.model.scale, self.model.tile_multiple)
        multiple = {"autoencoder": self.model.decoder.factor, "decoder": tile}
        multiple |= {"structure" if isinstance(self.model, StableSRConfig) else "experts": tile}
        for name, px in multiple.items():
            patch: int = getattr(self, name).patch_px
            if patch % px:
                raise UsageError(f"{name}.patch_px is {patch}, expected a multiple of {px} for this model")

    def _check_first_stage(self, first: AutoencoderConfig) -> None:
        """Raise UsageError unless the decoder takes the latents of `first` and is trained whole."""
        mine = self.model.decoder
        for entry in ("factor", "z_channels", "embed_dim", "codebook_size"):
            if (got := getattr(mine, entry)) != (want := getattr(first, entry)):
                raise UsageError(f"model.decoder has {entry} {got}, first_stage {want}; make them equal")
        if self.decoder.trainable != "decoder+lr":
            raise UsageError(
                f'first_stage: decoder.trainable is "{self.decoder.trainable}", expected "decoder+lr", as '
                "none of the other network's weights are kept"
            )


def presets() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("moesr.training") / "presets"
    return sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))


def load_recipe(name_or_path: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a JSON file or a preset's name, and apply `changes`, each "dotted.key=JSON value".

    A value that is not JSON is taken as text. Raises UsageError naming what is wrong with it.
    """
    values = _read(name_or_path, ())
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(f"--set {change}: expected key=value, as in experts.steps=1000")
        try:
            entry: Any = json.loads(text)
        except json.JSONDecodeError:
            entry = text
        for part in reversed(key.split(".")):
            entry = {part: entry}
        values = merged(values, entry)
    try:
        return build(Recipe, values, strict=True)
    except ValueError as error:
        raise UsageError(f"{name_or_path}: {error}; correct the recipe") from error


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `changes`; where both hold an object, these are merged too."""
    result = dict(base)
    for key, value in changes.items():
        before = result.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            result[key] = merged(before, value)
        else:
            result[key] = value
    return result


def _read(name_or_path: str, above: tuple[str, ...]) -> dict[str, Any]:
    """The JSON values of a recipe, merged over those of its base."""
    path = Path(name_or_path)
    if name_or_path in above:
        raise UsageError(f"{name_or_path}: is its own base ({' -> '.join(above)}); correct its entry base")
    if name_or_path in presets():
        text = (resources.files("moesr.training") / "presets" / f"{name_or_path}.json").read_text("utf-8")
    elif path.is_file():
        text = path.read_text("utf-8")
    else:
        raise UsageError(f"{name_or_path}: no such recipe file; presets are {', '.join(presets())}")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{name_or_path}: not JSON ({error}); expected a recipe") from error
    if not isinstance(values, dict):
        raise UsageError(f"{name_or_path}: got {type(values).__name__}, expected a JSON object")
    if (base := values.pop("base", None)) is None:
        return values
    near = path.parent / str(base)
    name = str(base) if base in presets() else str(near)
    return merged(_read(name, (*above, name_or_path)), values)
