"""Resizing as the runtime does it on the host."""

from __future__ import annotations

import numpy as np

from moesr.runtime.images.resize import Convention, imresize


def image_resize(pixels: np.ndarray, height: int, width: int, convention: Convention) -> np.ndarray:
    """Resize [H, W, 3] of uint8, uint16 or float32; the type is kept."""
    return imresize(pixels, height, width, convention=convention)
