"""The division of an image of any size into a canvas of tiles, according to the engine's manifest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moesr.runtime.engine.manifest import AutoencoderManifest, Manifest
from moesr.runtime.errors import InputError
from moesr.runtime.sampling import tiles

TILINGS = ("overlap", "shifted")
"""Layouts of the tiles while sampling: a fixed grid of wide overlap, or a narrow one that moves."""

SAMPLING_OVERLAP = {"overlap": 4, "shifted": 16}
"""While sampling, neighboring tiles share one part in so many, unless the manifest gives an overlap."""

CODING_OVERLAP = {"overlap": 8, "shifted": 16}
"""While encoding and decoding, which visit every tile once, neighboring tiles share one part in so many."""

AUTOENCODER_OVERLAP = 4
"""With the engine of an autoencoder, neighboring tiles share one part in so many.

Without an LR image that sets the colors, the levels of neighboring tiles differ more.
"""

ROOM = 8
"""The borders of a shifted grid can move by at least one part in so many of a tile."""

STRIDES = 49471, 37339
"""A shifted grid moves down and across by these parts in 65536 of its room at every move.

They are the fractions 0.7549 and 0.5698, whose multiples fill a square more evenly than random points (the R2
sequence of Roberts, 2018).
"""

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

    `height` and `width` are those of the input in LR pixels. `tiling` is one of TILINGS. With `wraps` the
    image is a texture whose opposite sides meet: it is neither padded nor enlarged to a tile, and tiles
    continue at the opposite side. ValueError is raised if a side is not positive, InputError if the sides are
    no whole number of latent pixels and the image wraps.
    """

    manifest: Manifest
    height: int
    width: int
    tiling: str = "overlap"
    wraps: bool = False

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"an image needs at least 1x1 pixels, got {self.width}x{self.height}")
        m = self.manifest
        if self.wraps and any(side * m.scale % m.latent_factor for side in (self.height, self.width)):
            whole = m.latent_factor // math.gcd(m.scale, m.latent_factor)
            raise InputError(
                f"the image is {self.width}x{self.height} pixels, but with tileable both sides have to be "
                f"multiples of {whole} for {m.name}; resize or crop the texture"
            )

    @cached_property
    def frame(self) -> Frame:
        """The sizes in output pixels. The canvas holds at least one tile and a whole number of latent pixels.

        Small images are padded by whole LR pixels, or enlarged until their shorter side fills a tile.
        """
        m, factor = self.manifest, self.manifest.latent_factor
        sides = self.height * m.scale, self.width * m.scale
        if self.wraps:
            return Frame(sides, sides)
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

    @property
    def sampling(self) -> Grid:
        """Tiles of the first sampling step. All steps have equally many."""
        return self.sampling_at(0)

    def sampling_at(self, move: int) -> Grid:
        """Tiles of a sampling step after so many moves of the grid, from 0."""
        return self._shifted(move) if self.tiling == "shifted" else self._fixed

    @property
    def overlap(self) -> int:
        """Latent pixels that neighboring tiles share at least while sampling."""
        given, tile = self.manifest.framing.overlap, self.manifest.latent_tile
        return tile // SAMPLING_OVERLAP[self.tiling] if given is None or self.tiling == "shifted" else given

    @property
    def coding_overlap(self) -> int:
        """Latent pixels that neighboring tiles share at least while encoding and decoding."""
        alone = isinstance(self.manifest, AutoencoderManifest)
        return self.manifest.latent_tile // (AUTOENCODER_OVERLAP if alone else CODING_OVERLAP[self.tiling])

    @cached_property
    def _fixed(self) -> Grid:
        tile = self.manifest.latent_tile
        if self.wraps:
            return self._around(self.overlap)
        strided = self.manifest.framing.tiling == "stablesr"
        return tiles.grid(*self.latent, tile, self.overlap, strided=strided)

    def _shifted(self, move: int) -> Grid:
        phases = [move * stride % 65536 / 65536 for stride in STRIDES]
        if self.wraps:
            return self._around(self.overlap, phases)
        tile = self.manifest.latent_tile
        rows, columns = (
            tiles.shifted_origins(size, tile, self.overlap, tile // ROOM, phase)
            for size, phase in zip(self.latent, phases, strict=True)
        )
        return [(y, x) for y in rows for x in columns]

    def _around(self, overlap: int, phases: Sequence[float] = (0.0, 0.0)) -> Grid:
        tile = self.manifest.latent_tile
        rows, columns = (
            tiles.wrapped_origins(size, tile, overlap, phase)
            for size, phase in zip(self.latent, phases, strict=True)
        )
        return [(y, x) for y in rows for x in columns]

    @cached_property
    def coding(self) -> Grid:
        """Tiles to encode or decode."""
        if self.wraps:
            return self._around(self.coding_overlap)
        return tiles.grid(*self.latent, self.manifest.latent_tile, self.coding_overlap)

    @property
    def window(self) -> np.ndarray:
        """Weights of a tile while sampling: float32 [tile, tile] in latent pixels."""
        tile = self.manifest.latent_tile
        if self.tiling == "shifted":
            return tiles.feather_weights(tile, self.overlap)
        return tiles.gaussian_weights(tile, 0.5 if self.manifest.framing.tiling == "stablesr" else 0.0)

    def coding_window(self, factor: int) -> np.ndarray:
        """Weights of a tile while encoding (a factor of 1) and decoding (output pixels per latent pixel)."""
        return tiles.feather_weights(self.manifest.latent_tile * factor, self.coding_overlap * factor)


def usual_tiling(manifest: Manifest) -> str:
    """The tiling that an engine uses by default; a method that defines its overlap keeps that."""
    given = manifest.framing.tiling == "stablesr" or manifest.framing.overlap is not None
    return "overlap" if given else "shifted"


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
