"""Canvas sizes and tile windows for all tests of tiling."""

from __future__ import annotations

from moesr.runtime.sampling.tiles import feather_weights, gaussian_weights

CANVASES = [(128, 128), (129, 128), (1000, 137), (131, 300), (255, 256)]


WEIGHTS = {"gaussian": gaussian_weights, "feather": lambda tile: feather_weights(tile, 16)}
