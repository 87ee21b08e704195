"""Random networks and runs of exported graphs, for the tests of the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from moesr.export.graph import Graph
from moesr.runtime.sessions.ort import session_options


@torch.no_grad()
def random_network(network: nn.Module, seed: int) -> nn.Module:
    """Fill a network so that every weight, bias and running statistic matters to the output."""
    rng = torch.Generator().manual_seed(seed)
    for module in network.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "running_var":
                tensor.uniform_(0.5, 1.5, generator=rng)
            elif tensor.is_floating_point():
                scale = 0.1 if tensor.dim() == 1 else tensor[0].numel() ** -0.5
                centre = 1.0 if name == "weight" and tensor.dim() == 1 else 0.0
                tensor.normal_(centre, scale, generator=rng)
    return network.eval()


def run(model: Path | Graph, inputs: dict[str, np.ndarray]) -> np.ndarray:
    source = model if isinstance(model, Path) else model.model.SerializeToString()
    return np.asarray(ort.InferenceSession(source, session_options()).run(None, inputs)[0])
