"""`moesr::sampler_step` for PyTorch, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from moesr.kernels.dispatch import has_kernels, plan_for
from moesr.kernels.launch import launch
from moesr.kernels.sampler_step import reference
from moesr.kernels.sampler_step.op import OP, table


@torch.library.custom_op("moesr::sampler_step", mutates_args=("z", "sums"))
def sampler_step(z: Tensor, sums: Tensor, coefficients: Tensor, seed: int, step: int) -> None:
    """`z <- c_z z + c_out sums + c_noise noise(seed, step)` and `sums <- 0`; all float32, contiguous.

    `z` and `sums` [C, H, W]; `coefficients` [3] are (c_z, c_out, c_noise). `seed` is 0 .. 2**63 - 1, `step`
    as in `moesr.runtime.noise`. ValueError where a tensor does not fit.
    """
    for name, x in {"z": z, "sums": sums, "coefficients": coefficients}.items():
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32, got {x.dtype} with strides {x.stride()}")
    if z.ndim != 3 or z.shape != sums.shape or coefficients.shape != (3,):
        got = f"{tuple(z.shape)}, {tuple(sums.shape)}, {tuple(coefficients.shape)}"
        raise ValueError(f"z and sums must be of one shape [C, H, W], and coefficients [3], got {got}")
    if not has_kernels(z):
        moved, cleared = reference.sampler_step(z, sums, coefficients, seed, step)
        z.copy_(moved)
        sums.copy_(cleared)
        return
    shape = {"jobs": 1, "channels": z.shape[0], "height": z.shape[1], "width": z.shape[2]}
    jobs = table([(z, sums, coefficients, seed, step)]).to(z.device)
    launch(OP, plan_for(OP, shape, z.dtype, z.device), {"jobs": jobs})


@sampler_step.register_fake
def _(z: Tensor, sums: Tensor, coefficients: Tensor, seed: int, step: int) -> None:
    return None
