"""Exports the autoencoder of a text-to-image model: its graphs and its manifest."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from moesr.export import parity
from moesr.export.graph_writer import GraphWriter
from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.stablesr import LatentDecoder, LatentEncoder, encoder_graph
from moesr.export.reuse import shared
from moesr.runtime.engine.graph_io import DECODER, ENCODER, UNREFINED
from moesr.runtime.engine.graph_spec import Graph
from moesr.runtime.engine.manifest import AutoencoderManifest
from moesr.training.checkpoint import VaeCheckpoint
from moesr.training.config import VaeConfig
from moesr.training.networks import Autoencoder


def roles(config: VaeConfig) -> list[str]:
    """Return the roles of the graphs that `write_graphs` writes."""
    written = {ENCODER: config.encoder, DECODER: True, UNREFINED: config.decoder.refinement != "none"}
    return [role for role, needed in written.items() if needed]


def write_graphs(checkpoint: VaeCheckpoint, tile_px: int, writer: GraphWriter) -> dict[str, Graph]:
    """Write the graphs for tiles of `tile_px` image pixels and return them by role.

    Their latents are those of the text-to-image model: the autoencoder's times the scaling factor. The
    decoder without the refinement network shares its weights with the whole one.
    """
    config, latent_px = checkpoint.config, tile_px // checkpoint.config.decoder.factor
    autoencoder, scale = checkpoint.decoder(), config.latent_scale
    graphs: dict[str, Graph] = {}
    for role in roles(config):
        if role == ENCODER:
            encoder = LatentEncoder(autoencoder, scale).eval()
            inputs = parity.encoder_inputs(config.decoder, latent_px)
            graphs[role] = writer.write(role, encoder, partial(encoder_graph, encoder, latent_px), inputs)
            continue
        refined = role == DECODER
        network = LatentDecoder(autoencoder, scale, refined=refined).eval()
        make = partial(decoder_graph, autoencoder, latent_px, latent_scale=scale, refined=refined)
        inputs = parity.decoder_inputs(autoencoder, latent_px)
        graphs[role] = writer.write(role, network, make, inputs)
        params = _decoder_params(autoencoder, refined=refined)
        if role == UNREFINED:
            graphs |= shared(writer.directory, graphs, DECODER, UNREFINED, params)
        else:
            graphs[role] = replace(graphs[role], params=params)
    return graphs


def _decoder_params(autoencoder: Autoencoder, *, refined: bool) -> int:
    """Return the number of parameters that decoding uses."""
    parts: list[nn.Module] = [autoencoder.post_quant_conv, autoencoder.decoder]
    count = sum(p.numel() for part in parts for p in part.parameters())
    if refined or autoencoder.config.refinement == "none":
        return count
    return count - sum(p.numel() for p in autoencoder.decoder.unet_1.parameters())


def manifest(
    config: VaeConfig, tile_px: int, graphs: dict[str, Graph], versions: dict[str, str], sha256: str
) -> AutoencoderManifest:
    """Return the manifest of the engine; `sha256` is that of the checkpoint."""
    return AutoencoderManifest(
        name=config.name,
        model=config.to_dict(),
        tile=tile_px,
        latent_channels=config.decoder.embed_dim,
        latent_factor=config.decoder.factor,
        latent_scale=config.latent_scale,
        graphs=graphs,
        versions=versions,
        checkpoint_sha256=sha256,
    )
