"""Training recipes: a model's sizes and how each of its stages is trained, as frozen dataclasses read from JSON.

A recipe is a file or the name of a preset beside this module. Defaults are the paper's (Tables 7 and 8).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from moesr.runtime.errors import UsageError
from moesr.training.config import ModelConfig, build


@dataclass(frozen=True)
class StageConfig:
    """What every stage has in common."""

    steps: int = 100_000
    batch: int = 9  # samples in memory at once, in each process
    accumulate: int = 1  # batches a step
    patch_px: int = 512  # side of the HR crop
    learning_rate: float = 5e-5
    decay: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    ema_decay: float = 0.9999
    clip_norm: float = 0.0  # 0: gradients are not clipped
    precision: Literal["fp32", "bf16"] = "fp32"
    save_every: int = 1000


@dataclass(frozen=True)
class AutoencoderStage(StageConfig):
    """The first stage: a plain VQ autoencoder, trained without GAN or LPIPS terms."""

    l1_weight: float = 1.0
    frequency_weight: float = 0.0
    commitment: float = 0.25
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
    latent_pool: int = 0  # crops encoded once and drawn from again; 0: every crop is new

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
    frequency_weight: float = 10.0  # lambda of Eq. 6
    trainable: Literal["fusion+refinement", "decoder"] = "fusion+refinement"
    latents: int = 100_000  # (LR, latent, HR) triples made by stage 1
    latent_steps: int = 200  # sampler steps for them


@dataclass(frozen=True)
class Recipe:
    """A model and how to train it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    degradation: Literal["bicubic"] = "bicubic"
    seed: int = 0
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    experts: ExpertStage = field(default_factory=ExpertStage)
    decoder: DecoderStage = field(default_factory=DecoderStage)


def presets() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("moesr.training") / "presets"
    return sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe from a JSON file or a preset's name; a `UsageError` names what is wrong with it."""
    if name_or_path in presets():
        text = (resources.files("moesr.training") / "presets" / f"{name_or_path}.json").read_text()
    elif (path := Path(name_or_path)).is_file():
        text = path.read_text()
    else:
        raise UsageError(f"--config {name_or_path}: no such file; presets are {', '.join(presets())}")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{name_or_path}: not JSON ({error}); expected a recipe") from error
    return build(Recipe, values, where=name_or_path)
