"""Decoding of an image that is too large to be held: row by row of tiles, on the host.

A band of pixels as high as a tile moves down the image. When a row of tiles is decoded, the rows of pixels
that no further tile overlaps are complete: they are handed over, and the band moves on to the next row.
The values are those of `passes.Decoding`, because every pixel adds up the same tiles in the same order.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Protocol

import numpy as np

from moesr.runtime.devices.host import HostDevice
from moesr.runtime.devices.interface import Canvas, Mean
from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.loop.passes import Decoding, Pass
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.sampling import tiles


class RowSink(Protocol):
    """Takes the decoded rows of an image in order from the top."""

    def write(self, start: int, rows: np.ndarray) -> None:
        """Take float32 [3, rows, W], the rows of the canvas from `start` on; the array is used again."""
        ...


class BandDecoding(Pass):
    """The pass from a clean latent to rows of pixels. Every row of tiles is a round; `target` is the band."""

    stage = Decoding.stage

    def __init__(
        self, layout: TileLayout, device: HostDevice, z: Canvas, lr: Canvas, fidelity: float, sink: RowSink
    ) -> None:
        """`z` is the latent canvas, `lr` the input at output size."""
        m, factor = layout.manifest, layout.manifest.latent_factor
        self._window = layout.coding_window(factor)
        self._rows = [list(row) for _, row in groupby(layout.coding, key=itemgetter(0))]
        self._height, self._at, self._sink = layout.latent[0], 0, sink
        width = layout.frame.canvas[1]
        columns = [(0, x) for _, x in self._rows[0]]
        band = device.mean((3, m.tile, width), columns, self._window, factor)
        super().__init__(m, self._rows[0], band, {"z": z, "lr": lr}, {"fidelity": fidelity})
        self.target = self._placed(band)

    @property
    def role(self) -> str:
        """The role of the decoder."""
        return DECODER

    def _placed(self, band: Mean) -> Mean:
        """Return the band at the current row of tiles, with the weights of all tiles that overlap it."""
        factor, tile = band.factor, len(self._window)
        top = self._rows[self._at][0][0]
        near = [row for row in self._rows if abs(row[0][0] - top) * factor < tile]
        first, last = near[0][0][0], near[-1][0][0]
        origins = [((y - first) * factor, x * factor) for row in near for y, x in row]
        height = (last - first) * factor + tile
        weights = tiles.weight_sum(height, band.data.shape[2], origins, self._window)
        start = (top - first) * factor
        return replace(band, top=top, weight_sum=weights[start : start + tile].copy())

    def _end_round(self) -> None:
        """Hand over the complete rows, and move the band to the next row of tiles."""
        top, band = self.target.top, self.target
        following = self._at + 1
        self.done = following == len(self._rows)
        end = self._height if self.done else self._rows[following][0][0]
        count = (end - top) * band.factor
        self._sink.write(top * band.factor, band.data[:, :count])
        if self.done:
            return
        kept = band.data.shape[1] - count
        for plane in band.data:  # one at a time, because the overlapping copy takes memory
            plane[:kept] = plane[count:]
        band.data[:, kept:] = 0.0
        self._at, self.tiles = following, self._rows[following]
        self.target = self._placed(band)
