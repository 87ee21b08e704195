"""A narrow autoencoder of a text-to-image model with random weights: its checkpoint and its engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from moesr.export.options import ExportOptions
from moesr.export.package import export_engine
from moesr.training.checkpoint import Checkpoint, save_checkpoint
from moesr.training.config import KL_F8, VaeConfig

TINY = dataclasses.replace(KL_F8, channels=8, channel_mult=(1, 1, 2, 2), res_blocks=1, norm_groups=4)
"""A network of the published form with few channels."""

TILE = 64


def tiny_checkpoint(directory: Path, *, encoder: bool = True, refinement: str = "aff") -> Checkpoint:
    """Write a checkpoint of random weights whose images stay in range."""
    from moesr.training.weights import networks

    decoder = dataclasses.replace(TINY, refinement=refinement)  # type: ignore[arg-type]
    config = VaeConfig(decoder=decoder, encoder=encoder)
    torch.manual_seed(0)
    kind, sizes = networks(config)["decoder"]
    network = kind(sizes).eval()
    return save_checkpoint(directory, config, (), network.state_dict())


def tiny_engine(directory: Path, **options: bool | str) -> Path:
    """Write the engine of `tiny_checkpoint` with tiles of 64 px and return its directory."""
    checkpoint = tiny_checkpoint(directory.with_name(f"{directory.name}-checkpoint"), **options)  # type: ignore[arg-type]
    export_engine(checkpoint, directory, ExportOptions(tile_px=TILE))
    return directory
