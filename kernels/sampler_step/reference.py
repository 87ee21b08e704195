"""The sampler's step in PyTorch, with the host's noise."""

from __future__ import annotations

import torch
from torch import Tensor

from moesr.runtime.sampling import noise


def sampler_step(
    z: Tensor, sums: Tensor, coefficients: Tensor, seed: int, step: int, history: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the new z, the cleared sums and the new history (None if there is none).

    The new z is `c_z z + c_history history + c_out sums + c_noise noise(seed, step)`, and the new history is
    `x_z z + x_out sums`. All tensors have the shape [C, H, W]. `coefficients` are (c_z, c_out, c_noise) and,
    with a history, (c_history, x_z, x_out). No noise is generated if `c_noise` is 0.
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
