"""The sampler's step as the host takes it, with the host's noise."""

from __future__ import annotations

import torch
from torch import Tensor

from moesr.runtime import noise


def sampler_step(
    z: Tensor, sums: Tensor, coefficients: Tensor, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """`c_z z + c_out sums + c_noise noise(seed, step)` and the cleared sums, [C, H, W] as `z`.

    `coefficients` are (c_z, c_out, c_noise); without the last no noise is made.
    """
    c_z, c_out, c_noise = coefficients.unbind()
    moved = z * c_z + sums * c_out
    if c_noise != 0:
        drawn = torch.from_numpy(noise.gaussian(seed, step, tuple(z.shape)))
        moved = moved + drawn.to(z.device) * c_noise
    return moved, torch.zeros_like(sums)
