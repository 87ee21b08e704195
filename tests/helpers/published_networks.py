"""The configuration of the published narrow decoder, and a function that loads weights into a network."""

from __future__ import annotations

import numpy as np
import torch

from moesr.training.config import AutoencoderConfig

CHANNELS_32 = AutoencoderConfig(channels=32, codebook_size=256)


def load(network: torch.nn.Module, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    network.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in weights.items()}, strict=True)
    return network.eval()
