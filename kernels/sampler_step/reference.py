"""The sampler's step as the host takes it, with the host's noise."""

from __future__ import annotations

import torch
from torch import Tensor

from moesr.runtime.sampling import noise


def sampler_step(
    z: Tensor, sums: Tensor, coefficients: Tensor, seed: int, step: int, history: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`c_z z + c_history history + c_out sums + c_noise noise(seed, step)`, the cleared sums and the history.

    All [C, H, W] as `z`. `coefficients` are (c_z, c_out, c_noise) and, where there is a history, (c_history,
    x_z, x_out): it becomes `x_z z + x_out sums`. Without `c_noise` no noise is made.
    """
    c_z, c_out, c_noise = coefficients[:3].unbind()
    moved, kept = z * c_z, None
    if history is not None:
        c_history, x_z, x_out = coefficients[3:].unbind()
        moved = moved + history * c_history
        kept = z * x_z + sums * x_out
    moved = moved + sums * c_out
    if c_noise != 0:
        drawn = torch.from_numpy(noise.gaussian(seed, step, tuple(z.shape)))
        moved = moved + drawn.to(z.device) * c_noise
    return moved, torch.zeros_like(sums), kept
