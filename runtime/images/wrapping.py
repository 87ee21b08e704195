"""Resizing and color correction of seamless textures, whose opposite sides meet.

The image is extended by its own opposite sides, worked on as any other, and cropped.
"""

from __future__ import annotations

import math

import numpy as np

from moesr.runtime.images import color
from moesr.runtime.images.resize import Convention, imresize

_REACH_PX = 64
"""Pixels that filters of the color correction reach; the low band of `wavelet` takes 31 on each side."""

_TAPS_PX = 4  # pixels of the coarser image that a resize reaches


def resize(image: np.ndarray, height: int, width: int, convention: Convention = "matlab") -> np.ndarray:
    """`imresize` of a seamless texture, [H, W] or [H, W, C] of uint8, uint16 or float32."""
    rows, columns = _margin(image.shape[0], height), _margin(image.shape[1], width)
    if image.ndim == 3:
        padded = np.pad(image, ((rows, rows), (columns, columns), (0, 0)), mode="wrap")
    else:
        padded = np.pad(image, ((rows, rows), (columns, columns)), mode="wrap")
    top, left = rows * height // image.shape[0], columns * width // image.shape[1]
    resized = imresize(padded, height + 2 * top, width + 2 * left, convention=convention)
    return np.ascontiguousarray(resized[top : top + height, left : left + width])


def fix_color(sr: np.ndarray, lr_up: np.ndarray, method: str) -> np.ndarray:
    """`color.fix_color` of one plane [H, W] of a seamless texture.

    Every pixel occurs equally often in the extended image, so statistics stay as they are.
    """
    padding = [_repeats(side) for side in sr.shape]
    fixed = color.fix_color(np.pad(sr, padding, mode="wrap"), np.pad(lr_up, padding, mode="wrap"), method)
    (top, _), (left, _) = padding
    return fixed[top : top + sr.shape[0], left : left + sr.shape[1]]


def _margin(size: int, new_size: int) -> int:
    """Pixels to add at either end so that a whole number of new pixels is added."""
    whole = size // math.gcd(size, new_size)
    wanted = _TAPS_PX * max(1, -(-size // new_size))
    return -(-wanted // whole) * whole


def _repeats(side: int) -> tuple[int, int]:
    """Pixels to add before and after `side` pixels, whole repetitions in all, each at least `_REACH_PX`."""
    repeats = -(-2 * _REACH_PX // side)
    before = repeats * side // 2 // 4 * 4  # clipped regions are found in cells of 4 pixels
    return before, repeats * side - before
