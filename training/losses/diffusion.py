"""The diffusion loss of stage 1 and the sampling of latents, in torch (paper Eq. 1-3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moesr.runtime.sampling.samplers import Prediction, coefficients
from moesr.runtime.sampling.schedule import Schedule, StepTable
from moesr.training.seeded_random import SampleRng

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z_t, cond, t) -> prediction


def add_noise(z: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return z_t for clean latents `z` and noise `eps`, both [B, C, h, w], and timesteps `t` [B] (Eq. 1)."""
    signal, noise = scales(t, schedule, z)
    return signal * z + noise * eps


def predict_x0(
    z_t: Tensor, out: Tensor, t: Tensor, schedule: Schedule, prediction: Prediction = "eps"
) -> Tensor:
    """Return the clean latents that `z_t` and the prediction `out` imply; both [B, C, h, w], `t` [B]."""
    signal, noise = scales(t, schedule, z_t)
    if prediction == "v":
        return signal * z_t - noise * out
    return (z_t - noise * out) / signal if prediction == "eps" else out


def scales(t: Tensor, schedule: Schedule, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) of `t` [B], each [B, 1, 1, 1] and typed as `like`."""
    alpha_bar = torch.from_numpy(schedule.alpha_bar.copy())[t.cpu()][:, None, None, None]
    return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)


def denoising_loss(
    network: Denoiser,
    z: Tensor,
    cond: Tensor,
    t_range: tuple[int, int],
    schedule: Schedule,
    rng: SampleRng,
    offset: float = 0.0,
    prediction: Prediction = "eps",
) -> Tensor:
    """Return the mean squared error of the prediction, with t drawn uniformly from [t_from, t_to) (Eq. 2).

    `offset` is the standard deviation of a constant that is added to the noise of each channel. White noise
    changes a latent's mean so little that the network learns to copy the mean from z_t; but when sampling
    starts from pure noise, z_t does not contain it.
    """
    t, eps = rng.integers(*t_range), rng.normal(*z.shape[1:]).to(z.device)
    if offset:
        eps = eps + offset * rng.normal(z.shape[1], 1, 1).to(z.device)
    z_t = add_noise(z, eps, t, schedule)
    target = eps
    if prediction != "eps":
        signal, noise = scales(t, schedule, z)
        target = signal * eps - noise * z if prediction == "v" else z
    return F.mse_loss(network(z_t, cond, t.to(z.device)).float(), target)


@torch.inference_mode()
def sample(
    experts: Sequence[Denoiser],
    cond: Tensor,
    table: StepTable,
    rng: SampleRng,
    prediction: Prediction = "eps",
    noised: Schedule | None = None,
) -> Tensor:
    """Sample latents [B, C, h, w] for conditions `cond` of that shape.

    Sampling starts from noise, or, with the schedule `noised`, from the condition noised to its last
    timestep. The runtime's sampler does the same over tiles; training needs only batches.
    """
    shape = cond.shape[1:]
    z = rng.normal(*shape).to(cond.device)
    if noised is not None:
        z = add_noise(cond, z, torch.full((len(z),), noised.timesteps - 1), noised)
    x0 = torch.zeros_like(z)
    for step, (t, k) in enumerate(zip(table.t.tolist(), table.expert.tolist(), strict=True)):
        c = coefficients(table, step, prediction)
        out = experts[k](z, cond, torch.full((len(z),), t, device=z.device))
        x0, before = float(c.x_z) * z + float(c.x_out) * out, x0
        z = float(c.c_z) * z + float(c.c_out) * out + float(c.c_history) * before
        if c.c_noise:
            z += float(c.c_noise) * rng.normal(*shape).to(z.device)
    return z
