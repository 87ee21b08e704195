"""How an image of any size becomes a canvas of tiles, and how tiles are laid over it, by model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesr.runtime.sampling import tiles

if TYPE_CHECKING:
    from moesr.runtime.engine.manifest import Manifest

SAMPLING_OVERLAP = 4  # neighbours share a quarter of a tile at every step, where the model does not say
CODING_OVERLAP = 8  # and an eighth when encoding and decoding, which happen once

Grid = list[tuple[int, int]]  # origins (y, x) of tiles
Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Frame:
    """Sizes of one image in output pixels: as the model sees it, and with what pads it to a canvas."""

    image: Size
    canvas: Size

    def latent(self, factor: int) -> Size:
        """Size of the latent canvas, for `factor` output pixels a latent pixel."""
        return self.canvas[0] // factor, self.canvas[1] // factor


def frame_of(manifest: Manifest, height: int, width: int) -> Frame:
    """The frame of an image of `height` x `width` LR pixels: at least a tile, whole latent pixels.

    Padding is of LR pixels where small images are padded, and of output pixels where they are enlarged.
    """
    m, factor = manifest, manifest.latent_factor
    sides = height * m.scale, width * m.scale
    if m.framing.small == "pad":
        multiple = math.lcm(m.scale, factor)
        least = -(-m.tile // m.scale) * m.scale
        return Frame(sides, (_up(max(sides[0], least), multiple), _up(max(sides[1], least), multiple)))
    short = min(sides)
    if short < m.tile:
        sides = sides[0] * m.tile // short, sides[1] * m.tile // short
    return Frame(sides, (_up(sides[0], factor), _up(sides[1], factor)))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def sampling_grid(manifest: Manifest, height: int, width: int) -> Grid:
    """Tiles of a step over a latent canvas."""
    framing, tile = manifest.framing, manifest.latent_tile
    overlap = tile // SAMPLING_OVERLAP if framing.overlap is None else framing.overlap
    return tiles.grid(height, width, tile, overlap, strided=framing.tiling == "stablesr")


def sampling_window(manifest: Manifest) -> np.ndarray:
    """Weights of a tile at every step: float32 [tile, tile] in latent pixels."""
    lowered = 0.5 if manifest.framing.tiling == "stablesr" else 0.0
    return tiles.gaussian_weights(manifest.latent_tile, lowered)


def coding_grid(manifest: Manifest, height: int, width: int) -> Grid:
    """Tiles to encode or decode, in latent pixels."""
    return tiles.grid(height, width, manifest.latent_tile, manifest.latent_tile // CODING_OVERLAP)
