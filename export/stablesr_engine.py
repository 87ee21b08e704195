"""Exports StableSR: its graphs, with one network in memory at a time, and its entries of the manifest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesr.export import parity
from moesr.export.graphs.builder import BuiltGraph
from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.stablesr import (
    LatentDecoder,
    LatentEncoder,
    StableSRExpert,
    encoder_graph,
    stablesr_expert_graph,
)
from moesr.export.lowering import Lowering
from moesr.export.prompts import Prompts
from moesr.runtime.engine.framing import Framing
from moesr.runtime.engine.graph_io import DECODER, ENCODER
from moesr.runtime.engine.graph_spec import Graph
from moesr.training.checkpoint import StableSRCheckpoint
from moesr.training.config import StableSRConfig

EXPERT = "expert_0"
OVERLAP = 32
"""Latent pixels that tiles share in the published scripts: half of a tile, or a third with the 768v model."""

Build = Callable[[Lowering], BuiltGraph]
Write = Callable[[str, nn.Module, Build, parity.Inputs], Graph]
"""Writes the graph that is built from a network under a role, and proves it on inputs."""


def write_graphs(
    checkpoint: StableSRCheckpoint, tile_px: int, prompts: Prompts, write: Write
) -> dict[str, Graph]:
    """Write all graphs for tiles of `tile_px` output pixels and return them by role."""
    config, latent_px = checkpoint.config, tile_px // checkpoint.config.decoder.factor
    text = encoded(checkpoint, prompts)
    graphs = {EXPERT: _write_expert(checkpoint, latent_px, text, write)}
    autoencoder, scale = checkpoint.decoder(), config.latent_scale
    encoder, decoder = LatentEncoder(autoencoder, scale).eval(), LatentDecoder(autoencoder, scale).eval()
    build = partial(encoder_graph, encoder, latent_px)
    inputs = parity.encoder_inputs(config.decoder, latent_px)
    graphs[ENCODER] = write(ENCODER, encoder, build, inputs)
    build = partial(decoder_graph, autoencoder, latent_px, latent_scale=scale)
    inputs = parity.decoder_inputs(autoencoder, latent_px)
    graphs[DECODER] = write(DECODER, decoder, build, inputs)
    return graphs


def encoded(checkpoint: StableSRCheckpoint, prompts: Prompts) -> Tensor:
    """Return the encoded prompts, [prompts, tokens, width]."""
    tower = checkpoint.text()
    return torch.cat([tower.encode(ids) for ids in prompts.ids])


def _write_expert(checkpoint: StableSRCheckpoint, latent_px: int, text: Tensor, write: Write) -> Graph:
    prediction = checkpoint.config.prediction
    network = StableSRExpert(checkpoint.unet(), checkpoint.structure(), text, prediction).eval()
    inputs = parity.stablesr_inputs(checkpoint.config, latent_px, len(text))
    return write(EXPERT, network, partial(stablesr_expert_graph, network, latent_px), inputs)


def entries(config: StableSRConfig, tile_px: int, prompts: Prompts) -> dict[str, Any]:
    """Return the manifest's entries that only this family has."""
    overlap = min(OVERLAP, tile_px // config.decoder.factor // 2)
    return {
        "latent_scale": config.latent_scale,
        "condition": "latent",
        "init": config.init,
        "prediction": config.prediction,
        "prompts": prompts.texts,
        "guidance": prompts.guidance,
        "fidelity": config.fidelity,
        "framing": Framing(small="enlarge", resize="torch", overlap=overlap, tiling="stablesr"),
    }
