"""Weights in the layout of published files, for the tests of the import."""

from __future__ import annotations

import re

import numpy as np
import torch

from moesr.runtime.sampling.schedule import Schedule
from moesr.training.importing.cli import main

BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
)


def tensors(weights: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.asarray(value)) for key, value in weights.items()}


def keep_space_experts(state: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    index = {key: re.search(r"moe_blocks\.(\d+)\.", key) for key in state}
    return {key: tensor for key, tensor in state.items() if not (m := index[key]) or int(m[1]) < count}


def ldm_level(unet, ema=None, first_stage=None) -> dict[str, torch.Tensor]:
    """Return weights in the layout of a published training checkpoint, with the buffers of its schedule."""
    state = {f"model.diffusion_model.{key}": tensor for key, tensor in unet.items()}
    if ema is not None:
        dotless = {f"model_ema.diffusion_model{key.replace('.', '')}": tensor for key, tensor in ema.items()}
        counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        state |= dotless | counters
    state |= {f"first_stage_model.{key}": tensor for key, tensor in (first_stage or {}).items()}
    betas = torch.from_numpy(Schedule().betas.astype(np.float32))
    return state | {name: torch.linspace(0, 1, 1000) for name in BUFFERS} | {"betas": betas}


def random_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for key, tensor in network.state_dict().items()
    }


def run(*args: object) -> int:
    return main([str(arg) for arg in args])
