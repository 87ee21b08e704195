"""The diffusion loss of stage 1 and the sampling of latents, in torch (paper Eq. 1-3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moesr.runtime.samplers import coefficients
from moesr.runtime.schedule import Schedule, StepTable
from moesr.training.draws import Draws

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z_t, cond, t) -> eps


def add_noise(z: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """z_t of clean latents `z` [B, C, h, w], noise `eps` of the same shape and timesteps `t` [B] (Eq. 1)."""
    signal, noise = scales(t, schedule, z)
    return signal * z + noise * eps


def predict_x0(z_t: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The clean latents that `z_t` and the predicted `eps` [B, C, h, w] imply at timesteps `t` [B]."""
    signal, noise = scales(t, schedule, z_t)
    return (z_t - noise * eps) / signal


def scales(t: Tensor, schedule: Schedule, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of timesteps `t` [B], [B, 1, 1, 1] each, typed as `like`."""
    alpha_bar = torch.from_numpy(schedule.alpha_bar.copy())[t.cpu()][:, None, None, None]
    return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)


def eps_loss(
    network: Denoiser,
    z: Tensor,
    cond: Tensor,
    t_range: tuple[int, int],
    schedule: Schedule,
    draws: Draws,
    offset: float = 0.0,
) -> Tensor:
    """Mean squared error on eps, with t drawn uniformly from [t_from, t_to) (Eq. 2).

    `offset` is the deviation of a constant that is added to the noise of each channel. White noise hides the
    mean of a latent so little that the network copies it from z_t, which holds none when sampling begins.
    """
    t, eps = draws.integers(*t_range), draws.normal(*z.shape[1:]).to(z.device)
    if offset:
        eps = eps + offset * draws.normal(z.shape[1], 1, 1).to(z.device)
    z_t = add_noise(z, eps, t, schedule)
    return F.mse_loss(network(z_t, cond, t.to(z.device)).float(), eps)


@torch.inference_mode()
def sample(experts: Sequence[Denoiser], cond: Tensor, table: StepTable, draws: Draws) -> Tensor:
    """Draw latents [B, 3, h, w] for conditions `cond` of that shape.

    The runtime's sampler does the same over tiles; training needs only batches.
    """
    shape = cond.shape[1:]
    z = draws.normal(*shape).to(cond.device)
    for step, (t, k) in enumerate(zip(table.t.tolist(), table.expert.tolist(), strict=True)):
        c = coefficients(table, step)
        eps = experts[k](z, cond, torch.full((len(z),), t, device=z.device))
        z = float(c.c_z) * z + float(c.c_out) * eps
        if c.c_noise:
            z += float(c.c_noise) * draws.normal(*shape).to(z.device)
    return z
