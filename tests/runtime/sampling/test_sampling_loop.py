"""The whole sampling loop over four experts reproduces the published loop for prescribed noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import relative_l2

from moesr.runtime.sampling.samplers import advance, coefficients
from moesr.runtime.sampling.schedule import Schedule, step_table
from moesr.training.checkpoint import merge_space_experts
from moesr.training.config import ModelConfig, UNetConfig
from moesr.training.networks import DenoisingUNet

WIDTH_32 = UNetConfig(width=32, space_experts=1)
RANGES = ModelConfig().expert_ranges


@pytest.fixture(scope="module")
def experts(published_weights) -> list[DenoisingUNet]:
    networks = []
    for stage in range(len(RANGES)):
        weights = published_weights("unet_w32", f"dev-stage{stage}")
        network = DenoisingUNet(WIDTH_32).eval()
        network.load_state_dict(merge_space_experts({k: torch.from_numpy(v) for k, v in weights.items()}))
        networks.append(network)
    return networks


@pytest.mark.parametrize(
    ("stem", "steps", "eta", "visited"),
    [("ddim_s8_eta1", 8, 1.0, [3, 3, 2, 2, 1, 1, 0, 0]), ("ddim_s5_eta0", 5, 0.0, [3, 2, 1, 0, 0])],
    ids=["8-steps-ddpm", "5-steps-ddim"],
)
@torch.inference_mode()
def test_loop(stem, steps, eta, visited, golden, experts):
    data = golden(stem)
    table = step_table(Schedule(), steps, eta, RANGES)
    np.testing.assert_array_equal(table.t[::-1], data["timesteps"])
    assert table.expert.tolist() == visited
    cond = torch.from_numpy(data["cond"])
    z, scratch = data["x_T"].copy(), np.empty_like(data["x_T"])
    for step in range(steps):
        t = torch.tensor([table.t[step]])
        eps = experts[table.expert[step]](torch.from_numpy(z), cond, t).numpy()
        # noise is stored in the order of execution
        advance(z, eps, data["noise"][step], coefficients(table, step), scratch)
    assert relative_l2(z, data["x_0"]) < 1e-4
