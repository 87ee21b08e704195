"""The networks of StableSR in the sizes of its goldens, and its sampling loop over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from graphs import random_network

from moesr.runtime.sampling.samplers import Prediction, advance, coefficients
from moesr.runtime.sampling.schedule import StepTable
from moesr.training.checkpoint import save_checkpoint
from moesr.training.config import (
    CFW_AUTOENCODER,
    StableSRConfig,
    StableSRUNetConfig,
    StructureConfig,
    TextConfig,
)
from moesr.training.networks import Autoencoder, StableSRUNet, StructureEncoder, TextEncoder
from moesr.training.weights import networks

NARROW = StableSRConfig(
    name="narrow",
    unet=StableSRUNetConfig(width=32, head_channels=16, text_channels=64, structure_channels=32),
    structure=StructureConfig(width=32, out_channels=32, heads=2),
    text=TextConfig(width=64, layers=3, heads=4),
    decoder=dataclasses.replace(CFW_AUTOENCODER, channels=32),
)
SMALL = (1, 1, 1, 2)
TINY = StableSRConfig(
    name="tiny",
    tile=64,
    unet=StableSRUNetConfig(
        width=16,
        channel_mult=SMALL,
        res_blocks=1,
        head_channels=16,
        norm_groups=8,
        text_channels=16,
        structure_channels=16,
    ),
    structure=StructureConfig(
        width=16, out_channels=16, channel_mult=SMALL, res_blocks=1, heads=1, norm_groups=8
    ),
    text=TextConfig(width=16, layers=2, heads=1, vocabulary=49408),
    decoder=dataclasses.replace(
        CFW_AUTOENCODER, channels=16, channel_mult=(1, 1, 1, 1), res_blocks=1, norm_groups=8
    ),
)
"""A configuration that is smaller than that of any golden."""

FULL = StableSRConfig()
NETWORKS = {
    f"{network}_{size}": (kind, getattr(config, entry))
    for size, config in (("narrow", NARROW), ("full", FULL))
    for network, kind, entry in (
        ("unet", StableSRUNet, "unet"),
        ("structcond", StructureEncoder, "structure"),
        ("text", TextEncoder, "text"),
        ("vae_cfw", Autoencoder, "decoder"),
    )
}
SALT = "dev"

Model = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # z_t, LR latent, t -> prediction


def write_checkpoint(directory: Path, config: StableSRConfig) -> Path:
    """Write a checkpoint of random networks."""
    kinds = networks(config)
    states = {
        part: random_network(kind(sizes), k).state_dict()
        for k, (part, (kind, sizes)) in enumerate(kinds.items())
    }
    others = [(part, states[part]) for part in ("structure", "text")]
    save_checkpoint(directory, config, [states["expert"]], states["decoder"], others=others)
    return directory


def load(name: str, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """Return one of `NETWORKS` with these weights; `weights` is emptied to save memory."""
    kind, sizes = NETWORKS[name]
    with torch.device("meta"):
        network = kind(sizes)  # type: ignore[arg-type]
    state = {key: torch.from_numpy(np.asarray(weights.pop(key))) for key in list(weights)}
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


@dataclass(frozen=True)
class Denoiser:
    """The UNet with its structure encoder and the encoded prompts."""

    unet: torch.nn.Module
    encoder: torch.nn.Module
    text: np.ndarray
    negative: np.ndarray | None = None
    guidance: float = 1.0

    def __call__(self, z: np.ndarray, latent: np.ndarray, t: int) -> np.ndarray:
        steps = torch.full((len(z),), t)
        structure = self.encoder(torch.from_numpy(latent), steps)
        texts = [self.text] if self.negative is None else [self.text, self.negative]
        outs = [self.unet(torch.from_numpy(z), steps, structure, torch.from_numpy(x)).numpy() for x in texts]
        return outs[0] if len(outs) == 1 else outs[1] + self.guidance * (outs[0] - outs[1])


@dataclass(frozen=True)
class Tiled:
    """A model that runs over a canvas with the published tiles and weights."""

    model: Model
    tile: int
    overlap: int

    def __call__(self, z: np.ndarray, latent: np.ndarray, t: int) -> np.ndarray:
        weights = np.outer(*published_weights(self.tile))
        total, out = np.zeros(z.shape[-2:], np.float32), np.zeros_like(z)
        for y in published_origins(z.shape[-2], self.tile, self.overlap):
            for x in published_origins(z.shape[-1], self.tile, self.overlap):
                place = np.s_[..., y : y + self.tile, x : x + self.tile]
                out[place] += weights * self.model(z[place].copy(), latent[place].copy(), t)
                total[place] += weights
        return out / total


def published_weights(tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Return Gaussian profiles along a column and along a row; their centers differ by half a pixel."""
    profile = [np.exp(-((np.arange(tile) - m) ** 2) / (0.02 * tile**2)) for m in (tile / 2, (tile - 1) / 2)]
    return profile[0] / np.sqrt(0.02 * np.pi), profile[1] / np.sqrt(0.02 * np.pi)


def published_origins(size: int, tile: int, overlap: int) -> list[int]:
    """Return the origins of tiles one stride apart; the last tile is moved back to the edge."""
    starts = range(0, max(size - overlap, 1), tile - overlap)
    return sorted({min(start, size - tile) for start in starts})


def sample(
    model: Model,
    z: np.ndarray,
    latent: np.ndarray,
    noise: np.ndarray,
    table: StepTable,
    prediction: Prediction,
) -> list[np.ndarray]:
    """Sample from `z` and return the latents after every step; `noise` is in the order of execution."""
    z, scratch, trace = z.copy(), np.empty_like(z), []
    for step in range(len(table)):
        out = model(z, latent, int(table.t[step]))
        advance(z, out, noise[step], coefficients(table, step, prediction), scratch)
        trace.append(z.copy())
    return trace
