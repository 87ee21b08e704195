"""Training recipes: a model's sizes and the settings of its stages, as frozen dataclasses read from JSON.

A recipe is a JSON file or the name of a preset in this package. It may name another recipe as its `base` and
contain only the differences. The defaults are the paper's (Tables 7 and 8), except that the loss terms of
stage 2 that need further networks (LPIPS, adversarial) are off.
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
from moesr.training.config import AutoencoderConfig, ModelConfig, StableSRConfig, VaeConfig


@dataclass(frozen=True)
class StageConfig:
    """Settings that every stage has."""

    steps: int = 100_000
    batch: int = 9  # batch size in each process
    accumulate: int = 1  # batches per optimizer step
    patch_px: int = 512  # side of the HR crop
    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's beta_1 and beta_2
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
    """The first stage: a plain VQ autoencoder, trained without adversarial and LPIPS losses."""

    l1_weight: float = 1.0
    mse_weight: float = 0.0
    frequency_weight: float = 0.0
    color_weight: float = 0.0  # L1 between means over 8x8 pixels, for narrow networks, which lose hues
    gradient_weight: float = 0.0  # one minus the gradient magnitude similarity
    commitment: float = 0.25
    refit_codebook: bool = False  # at the end, replace the codes by encoder outputs drawn at random
    lloyd_steps: int = 0  # steps of Lloyd's algorithm after refitting, to give rare latents their own codes
    latent_noise: float = 0.0  # noise before `quantise_from`, as a fraction of the latents' deviation
    quantise_from: int = 0  # step at which the codebook is set from encoder outputs; not used before


@dataclass(frozen=True)
class ExpertStage(StageConfig):
    """Stage 1 of the paper: the sampling experts."""

    accumulate: int = 2
    base_steps: int = 0  # steps of one network on all timesteps, whose weights all experts start from
    sharing: Literal["none", "constant", "ramp"] = "constant"  # expert weight sharing (Eq. 5)
    gamma: float = 0.999  # momentum with "constant" sharing
    ramp_to: float = 0.3  # with "ramp" sharing, 1 - gamma rises linearly from 0 to this value ...
    ramp_steps: int = 10_000  # ... during this number of steps
    offset_noise: float = 0.0  # deviation of a constant added to each channel's noise, to learn means
    latent_pool: int = 0  # number of crops that are encoded once and reused; 0: every crop is new

    def check(self, name: str) -> None:
        """Raise UsageError where an entry of this stage, called `name`, is out of range."""
        super().check(name)
        for entry in ("gamma", "ramp_to", "offset_noise"):
            _check(f"{name}.{entry}", getattr(self, entry), 0.0, 1.0)
        for entry, low in (("ramp_steps", 1), ("base_steps", 0), ("latent_pool", 0)):
            _check(f"{name}.{entry}", getattr(self, entry), low)

    def gamma_at(self, step: int) -> float | None:
        """Return gamma, the momentum of Eq. 5, after `step` finished steps; None without sharing."""
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
    # Fraction of the triples with the encoder's latent of the original in place of a sampled latent. The
    # fidelity w is then drawn so that a sample with w has the encoder's latent with probability 1 - w: a low
    # w tells the decoder to trust the latent.
    encoded_share: float = 0.0
    free_share: float = 0.0  # fraction of samples with fidelity 0 (if encoded_share > 0, with 0 or 1)
    energy_weight: float = 0.0  # local energy of detail, only for the samples of `free_share`
    spectrum_weight: float = 0.0  # shape of the log power spectrum, for all samples
    wavelet_colors: bool = False  # compute all losses but the color loss after wavelet color correction
    lpips_weight: float = 0.0
    lpips_weights: str = ""  # file with torchvision's VGG16 weights, for LPIPS
    adversarial_weight: float = 0.0
    adversarial_scaling: Literal["adaptive", "fixed"] = "adaptive"  # adaptive: multiplied by VQGAN's weight
    adversarial_from: int = 0  # first step with the adversarial loss
    # "decoder+lr" also trains the encoder's levels, initialized to pass LR colors on. It is for narrow
    # networks, whose encoder loses hues. The encoder then only serves LR images, not the first stage.
    trainable: Literal["fusion+refinement", "decoder", "decoder+lr"] = "fusion+refinement"
    init_share: float = 0.0  # network interpolation: share of the --init weights in the final checkpoint
    stored: Literal["fp32", "fp16"] = "fp32"  # type of all weights in the final checkpoint
    latents: int = 100_000  # number of (LR, latent, HR) triples made by stage 1
    latent_steps: int = 200  # sampling steps per latent
    latent_batch: int = 16  # batch size of the sampling

    def check(self, name: str) -> None:
        """Raise UsageError where an entry of this stage, called `name`, is out of range."""
        super().check(name)
        for entry in ("latents", "latent_steps", "latent_batch"):
            _check(f"{name}.{entry}", getattr(self, entry), 1)
        for entry in ("init_share", "free_share", "encoded_share"):
            _check(f"{name}.{entry}", getattr(self, entry), 0.0, 1.0)


@dataclass(frozen=True)
class Augmentation:
    """Augmentations of crops besides flips and transposition; all are off by default.

    Without them a network memorizes the textures of a small set of photographs and generalizes badly.
    """

    shuffle_channels: bool = False  # permute red, green and blue at random, which varies hues
    smallest_size: float = 1.0  # resize photographs by a random factor between this and 1
    least_contrast: float = 1.0  # scale the contrast around the mean color by a factor between this and 1
    candidates: int = 1  # number of random places in a photograph; the one with the most detail is used

    def __post_init__(self) -> None:
        _check("augmentation.smallest_size", self.smallest_size, 0.1, 1.0)
        _check("augmentation.least_contrast", self.least_contrast, 0.0, 1.0)
        _check("augmentation.candidates", self.candidates, 1)


@dataclass(frozen=True)
class Recipe:
    """A model and how to train it."""

    model: ModelConfig | StableSRConfig | VaeConfig = field(default_factory=ModelConfig)
    # Sizes of the autoencoder that makes the latents, if stage 2 trains another network as their decoder
    # (decoder.trainable "decoder+lr").
    first_stage: AutoencoderConfig | None = None
    degradation: Literal["bicubic", "blind", "mild"] = "bicubic"
    bicubic_share: float = 0.0  # fraction of a blind recipe's samples that are only resized by bicubic
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
        """Raise UsageError unless the decoder fits the latents of `first` and all its weights are trained."""
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
    """Return the names of the recipes that come with the package."""
    folder = resources.files("moesr.training") / "presets"
    return sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))


def load_recipe(name_or_path: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a JSON file or a preset's name, and apply `changes`, each "dotted.key=JSON value".

    A value that is not valid JSON is used as a string. Raises UsageError naming the entry at fault.
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
    """Return `base` updated with `changes`; entries that are objects in both are merged recursively."""
    result = dict(base)
    for key, value in changes.items():
        before = result.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            result[key] = merged(before, value)
        else:
            result[key] = value
    return result


def _read(name_or_path: str, above: tuple[str, ...]) -> dict[str, Any]:
    """Read the JSON values of a recipe, merged over those of its base."""
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
