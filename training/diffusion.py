"""The diffusion loss of stage 1 and the sampling of latents, in torch (paper Eq. 1-3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moesr.runtime.samplers import coefficients
from moesr.runtime.schedule import Schedule, StepTable

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z_t, cond, t) -> eps


def add_noise(z: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return z_t of clean latents `z` [B, C, h, w], noise `eps` of the same shape and timesteps `t` [B] (Eq. 1)."""
    alpha_bar = torch.from_numpy(schedule.alpha_bar.copy()).to(z.device)[t][:, None, None, None]
    return alpha_bar.sqrt().to(z.dtype) * z + (1 - alpha_bar).sqrt().to(z.dtype) * eps


def eps_loss(
    network: Denoiser, z: Tensor, cond: Tensor, t_range: tuple[int, int], schedule: Schedule
) -> Tensor:
    """Mean squared error on eps, with t drawn uniformly from [t_from, t_to) (Eq. 2)."""
    t = torch.randint(*t_range, (len(z),)).to(z.device)
    eps = torch.randn(z.shape).to(z.device)
    return F.mse_loss(network(add_noise(z, eps, t, schedule), cond, t).float(), eps)


@torch.inference_mode()
def sample(experts: list[Denoiser], cond: Tensor, table: StepTable) -> Tensor:
    """Draw latents [B, 3, h, w] for conditions `cond` of that shape, with global random numbers.

    The runtime's sampler does the same over tiles and with counter-based noise; training needs only batches.
    """
    z = torch.randn(cond.shape).to(cond.device)
    for step, (t, k) in enumerate(zip(table.t.tolist(), table.expert.tolist(), strict=True)):
        c = coefficients(table, step)
        eps = experts[k](z, cond, torch.full((len(z),), t, device=z.device))
        z = float(c.c_z) * z + float(c.c_eps) * eps
        if c.c_noise:
            z += float(c.c_noise) * torch.randn(z.shape).to(z.device)
    return z
