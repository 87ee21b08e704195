"""The noise schedule and the latent scale of a published latent diffusion model, from its file's buffers.

A training checkpoint of latent diffusion holds its schedule (`betas`), and `scale_factor` if training scaled
the latents to unit variance: the UNet's latents are then the autoencoder's times this factor. Files without
these buffers have the published super-resolution model's schedule and unscaled latents.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from moesr.runtime.sampling.schedule import MAX_TIMESTEPS, Schedule
from moesr.training.config import AutoencoderConfig
from moesr.training.importing.files import CURE
from moesr.training.weights import CheckpointError, StateDict

CLOSE = 1e-5  # relative error of betas that were computed in float32
DIGITS = 7  # significant digits of a float32 value

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class DiffusionFacts:
    """The schedule and the factor from the autoencoder's latents to the UNet's."""

    schedule: Schedule = field(default_factory=Schedule)
    latent_scale: float = 1.0
    foreign_betas: bool = False  # the file has betas of another form; `schedule` is the published one

    def warn(self, path: Path) -> None:
        """Log a warning if the schedule is not that of the file."""
        if self.foreign_betas:
            log.warning(
                "%s: the square roots of its betas are not evenly spaced, as in latent diffusion; the model "
                "gets the published schedule, betas %g to %g",
                path,
                self.schedule.beta_start,
                self.schedule.beta_end,
            )


def diffusion_facts(path: Path, state: StateDict) -> DiffusionFacts:
    """Read the facts from the buffers in `state`, the content of `path`.

    CheckpointError is raised if the factor is not a positive number.
    """
    schedule, scale = _schedule(state.get("betas")), _latent_scale(path, state.get("scale_factor"))
    return DiffusionFacts(schedule or Schedule(), scale, foreign_betas=schedule is None)


def _schedule(buffer: Tensor | None) -> Schedule | None:
    """Return the schedule with these betas, the published one without betas, None if there is none."""
    published = Schedule()
    if buffer is None:
        return published
    betas = buffer.double().flatten().numpy()
    if _equal(published, betas):
        return published
    if 1 < len(betas) <= MAX_TIMESTEPS and 0.0 < betas[0] <= betas[-1] < 1.0:
        first, last = (float(f"{end:.{DIGITS}g}") for end in betas[[0, -1]])
        schedule = Schedule(len(betas), first, last)
        return schedule if _equal(schedule, betas) else None
    return None


def _equal(schedule: Schedule, betas: np.ndarray) -> bool:
    return len(betas) == schedule.timesteps and bool(np.allclose(betas, schedule.betas, rtol=CLOSE, atol=0.0))


def _latent_scale(path: Path, buffer: Tensor | None) -> float:
    if buffer is None:
        return 1.0
    factor = float(buffer) if buffer.numel() == 1 else math.nan
    if not 0.0 < factor < math.inf:
        raise CheckpointError(f"{path}: scale_factor is not a positive number; {CURE}")
    return factor


def scaled_autoencoder(state: StateDict, config: AutoencoderConfig, factor: float) -> dict[str, Tensor]:
    """Return an autoencoder's weights whose latents are `factor` times those of the weights `state`.

    Its images are the same. The encoder's last convolution, the codebook (or the posterior's variance) and
    the decoder's first convolution take up the factor, so that nothing after the import has to know it.
    """
    scaled = dict(state)
    if factor == 1.0:
        return scaled
    for key in ("quant_conv.weight", "quant_conv.bias"):
        mean = scaled[key].clone()
        mean[: config.embed_dim] *= factor  # a KL autoencoder's other channels are the log-variance
        scaled[key] = mean
    if config.codebook_size:
        scaled["quantize.embedding.weight"] = scaled["quantize.embedding.weight"] * factor
    else:
        scaled["quant_conv.bias"][config.embed_dim :] += 2.0 * math.log(factor)
    scaled["post_quant_conv.weight"] = scaled["post_quant_conv.weight"] / factor
    return scaled
