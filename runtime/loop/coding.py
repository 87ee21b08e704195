"""Encoding and decoding alone, with the engine of an autoencoder: images to latents, latents to images."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator

import numpy as np

from moesr.runtime.devices.interface import Canvas, Device
from moesr.runtime.engine.graph_io import DECODER, ENCODER
from moesr.runtime.images.resize import reflect_pad
from moesr.runtime.loop.passes import Decoding, Encoding, Pass
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.loop.work import Work


class Coding(Work):
    """A single pass over an array [C, H, W], which is extended by reflection to fill the layout's canvas.

    Once it is done without error, `result` is the result for the whole canvas: float32 [C, H, W].
    """

    def __init__(self, layout: TileLayout, role: str, stage: str) -> None:
        super().__init__(layout, Counter({role: len(layout.coding)}), stage)
        self._role = role
        self.result: np.ndarray | None = None

    def _go_through(self, device: Device) -> Iterator[Pass]:
        self._pass = self._made(device)
        yield self._pass

    @abstractmethod
    def _made(self, device: Device) -> Pass:
        """Allocate the canvases and make the pass."""

    def _fetch(self) -> None:
        self.result = self._device.download(self._pass.target)

    def _filled(self, device: Device, values: np.ndarray, size: tuple[int, int], factor: int) -> Canvas:
        """Return a canvas of these values [C, H, W] with a reflected margin at the bottom and right."""
        canvas = device.canvas((len(values), *size), factor)
        device.fill(canvas, reflect_pad(values, *size)[0])
        return canvas


class LatentDecoding(Coding):
    """From a latent [C, h, w], scaled as the engine expects it, to an image [3, f h, f w]."""

    def __init__(self, layout: TileLayout, latent: np.ndarray, role: str = DECODER) -> None:
        """`role` is that of the graph, which may be the decoder without its refinement network."""
        super().__init__(layout, role, Decoding.stage)
        self._latent = latent

    def _made(self, device: Device) -> Pass:
        z = self._filled(device, self._latent, self.layout.latent, 1)
        return Decoding(self.layout, device, z, role=self._role)


class ImageEncoding(Coding):
    """From an image [3, H, W] in [-1, 1] to a latent: the mean of its posterior, or a sample of it."""

    def __init__(self, layout: TileLayout, image: np.ndarray, seed: int | None = None) -> None:
        """With a `seed` the latent is a sample, and without one it is the mean."""
        super().__init__(layout, ENCODER, Encoding.stage)
        self._image, self._seed = image, seed

    def _made(self, device: Device) -> Pass:
        factor = self.layout.manifest.latent_factor
        image = self._filled(device, self._image, self.layout.frame.canvas, factor)
        return Encoding(self.layout, device, image, self._seed)
