"""`moesr::sampler_step` for PyTorch; it changes its arguments in place."""

from __future__ import annotations

import torch
from torch import Tensor

from moesr.kernels.dispatch import has_kernels, plan_for
from moesr.kernels.launch import launch
from moesr.kernels.sampler_step import reference
from moesr.kernels.sampler_step.op import OP, table


@torch.library.custom_op("moesr::sampler_step", mutates_args=("z", "sums", "history"))
def sampler_step(
    z: Tensor, sums: Tensor, coefficients: Tensor, seed: int, step: int, history: Tensor | None = None
) -> None:
    """Set `z <- c_z z + c_out sums + c_noise noise(seed, step)` and `sums <- 0`.

    All tensors are float32 and contiguous. `z` and `sums` are [C, H, W]; `coefficients` [3] are (c_z, c_out,
    c_noise). `seed` is 0 .. 2**63 - 1, and `step` is that of `moesr.runtime.sampling.noise`. With a `history`
    [C, H, W] there are six coefficients, the last of them (c_history, x_z, x_out): `c_history history` is
    added to z, and `history <- x_z z + x_out sums`. ValueError is raised if a tensor does not fit.
    """
    canvases = {"z": z, "sums": sums} | ({} if history is None else {"history": history})
    for name, x in (canvases | {"coefficients": coefficients}).items():
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32, got {x.dtype} with strides {x.stride()}")
    count, names = 3 if history is None else 6, " and ".join(canvases)
    shapes = [tuple(x.shape) for x in canvases.values()]
    if z.ndim != 3 or len(set(shapes)) > 1 or coefficients.shape != (count,):
        got = ", ".join(map(str, [*shapes, tuple(coefficients.shape)]))
        raise ValueError(f"{names} must be of one shape [C, H, W], and coefficients [{count}], got {got}")
    if not has_kernels(z):
        moved, cleared, kept = reference.sampler_step(z, sums, coefficients, seed, step, history)
        z.copy_(moved)
        sums.copy_(cleared)
        if history is not None and kept is not None:
            history.copy_(kept)
        return
    shape = {"jobs": 1, "channels": z.shape[0], "height": z.shape[1], "width": z.shape[2]}
    jobs = table([(z, sums, coefficients, seed, step, history)]).to(z.device)
    launch(OP, plan_for(OP, shape, z.dtype, z.device), {"jobs": jobs})


@sampler_step.register_fake
def _(
    z: Tensor, sums: Tensor, coefficients: Tensor, seed: int, step: int, history: Tensor | None = None
) -> None:
    return None
