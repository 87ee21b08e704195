"""The division of an image of any size into a canvas of tiles, according to the engine's manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.sampling import tiles

SAMPLING_OVERLAP = 4
"""While sampling, neighboring tiles share a quarter of a tile, unless the manifest gives an overlap."""

CODING_OVERLAP = 8
"""While encoding and decoding, which run each tile once, neighboring tiles share an eighth."""

Grid = list[tuple[int, int]]
"""Origins (y, x) of tiles, in latent pixels."""

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Frame:
    """Sizes of one image in output pixels: `image` as the model sees it, `canvas` with its padding."""

    image: Size
    canvas: Size


@dataclass(frozen=True, eq=False)
class TileLayout:
    """The canvas of one image and the tiles on it, computed once and shared by all that need them.

    `height` and `width` are those of the input in LR pixels. ValueError is raised if one of them is not
    positive.
    """

    manifest: Manifest
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"an image needs at least 1x1 pixels, got {self.width}x{self.height}")

    @cached_property
    def frame(self) -> Frame:
        """The sizes in output pixels. The canvas holds at least one tile and a whole number of latent pixels.

        Small images are padded by whole LR pixels, or enlarged until their shorter side fills a tile.
        """
        m, factor = self.manifest, self.manifest.latent_factor
        sides = self.height * m.scale, self.width * m.scale
        if m.framing.small == "pad":
            multiple = math.lcm(m.scale, factor)
            least = -(-m.tile // m.scale) * m.scale
            return Frame(sides, (_up(max(sides[0], least), multiple), _up(max(sides[1], least), multiple)))
        short = min(sides)
        if short < m.tile:
            sides = sides[0] * m.tile // short, sides[1] * m.tile // short
        return Frame(sides, (_up(sides[0], factor), _up(sides[1], factor)))

    @property
    def result(self) -> Size:
        """The size of the result in output pixels."""
        return self.height * self.manifest.scale, self.width * self.manifest.scale

    @property
    def latent(self) -> Size:
        """The size of the latent canvas in latent pixels."""
        factor = self.manifest.latent_factor
        return self.frame.canvas[0] // factor, self.frame.canvas[1] // factor

    @cached_property
    def sampling(self) -> Grid:
        """The tiles that every sampling step visits."""
        framing, tile = self.manifest.framing, self.manifest.latent_tile
        overlap = tile // SAMPLING_OVERLAP if framing.overlap is None else framing.overlap
        return tiles.grid(*self.latent, tile, overlap, strided=framing.tiling == "stablesr")

    @cached_property
    def coding(self) -> Grid:
        """The tiles to encode or decode."""
        tile = self.manifest.latent_tile
        return tiles.grid(*self.latent, tile, tile // CODING_OVERLAP)


def sampling_window(manifest: Manifest) -> np.ndarray:
    """The weights of a tile while sampling: float32 [tile, tile] in latent pixels."""
    lowered = 0.5 if manifest.framing.tiling == "stablesr" else 0.0
    return tiles.gaussian_weights(manifest.latent_tile, lowered)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
