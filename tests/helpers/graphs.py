"""Random networks, their checkpoints, and runs of exported graphs, for the tests of the export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from moesr.export import parity
from moesr.export.bfloat16 import without_bf16
from moesr.export.graphs.builder import BuiltGraph
from moesr.training.checkpoint import save_checkpoint
from moesr.training.config import AutoencoderConfig, ModelConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet

NARROW = ModelConfig(
    name="narrow",
    unet=UNetConfig(width=32, space_experts=1),
    decoder=AutoencoderConfig(channels=32, codebook_size=64),
    expert_ranges=((0, 400), (400, 1000)),
)
TINY = ModelConfig(
    name="tiny",
    unet=UNetConfig(
        width=16,
        channel_mult=(1, 1, 1, 2),
        res_blocks=1,
        head_channels=16,
        norm_groups=8,
        space_experts=1,
    ),
    decoder=AutoencoderConfig(
        channels=16,
        res_blocks=1,
        codebook_size=64,
        norm_groups=8,
        fusion_blocks=1,
        fusion_growth=8,
        filter_blocks=4,
    ),
    expert_ranges=((0, 400), (400, 1000)),
)
PLAIN_LDM = dataclasses.replace(
    TINY,
    name="plain",
    unet=dataclasses.replace(TINY.unet, space_experts=0),
    decoder=dataclasses.replace(TINY.decoder, fusion_level=None, refinement="none"),
    expert_ranges=((0, 1000),),
)


@torch.no_grad()
def random_network(network: nn.Module, seed: int) -> nn.Module:
    """Fill a network so that every weight, bias and running statistic influences the output."""
    rng = torch.Generator().manual_seed(seed)
    for module in network.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "running_var":
                tensor.uniform_(0.5, 1.5, generator=rng)
            elif tensor.is_floating_point():
                scale = 0.1 if tensor.dim() <= 1 else tensor[0].numel() ** -0.5
                centre = 1.0 if name == "weight" and tensor.dim() == 1 else 0.0
                tensor.normal_(centre, scale, generator=rng)
    return network.eval()


def random_expert(k: int, config: ModelConfig = TINY) -> DenoisingUNet:
    """Return expert `k` of the checkpoint that `write_checkpoint` makes."""
    assert config.unet
    return random_network(DenoisingUNet(config.unet), k)


def random_decoder(config: ModelConfig = TINY) -> Autoencoder:
    """Return the decoder of the checkpoint that `write_checkpoint` makes."""
    return random_network(Autoencoder(config.decoder), 99)


def write_checkpoint(directory: Path, config: ModelConfig = TINY) -> Path:
    """Write a checkpoint of random networks."""
    experts = [random_expert(k, config).state_dict() for k in range(len(config.expert_ranges))]
    save_checkpoint(directory, config, experts, random_decoder(config).state_dict())
    return directory


def expert_inputs(batch: int, side: int) -> dict[str, np.ndarray]:
    """Return inputs of an expert at other timesteps than those of the parity check."""
    z_t, cond = np.random.default_rng(3).standard_normal((2, batch, 3, side, side), np.float32)
    return {"z_t": z_t, "cond": cond, "t": np.array([7, 999, 400], np.float32)[:batch]}


def decoder_inputs(network: Autoencoder, fidelity: list[float], side: int) -> dict[str, np.ndarray]:
    """Return inputs of a decoder, one tile per `fidelity`: those of the parity check and mirror images."""
    one = parity.decoder_inputs(network, side // 4)
    both = {k: np.concatenate([v, np.flip(v, 2)])[: len(fidelity)] for k, v in one.items() if v.ndim == 4}
    return both | ({"fidelity": np.array(fidelity, np.float32)} if "fidelity" in one else {})


def run(model: Path | BuiltGraph, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Run a graph and return its first output."""
    options = ort.SessionOptions()
    options.log_severity_level, options.enable_mem_reuse = 3, False
    data = model if isinstance(model, Path) else without_bf16(model.model).SerializeToString()
    session = ort.InferenceSession(data, options)
    return np.asarray(session.run(None, inputs)[0])
