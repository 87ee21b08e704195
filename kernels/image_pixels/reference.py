"""Pixels of a result as the runtime makes them on the host."""

from __future__ import annotations

import numpy as np

from moesr.runtime.images.planes import grey_of


def image_pixels(content: np.ndarray, top: int, grey: bool) -> np.ndarray:
    """Levels 0..top [H, W, 3] of float32 [3, H, W]; a grey image has the luma in all channels."""
    levels = np.clip(np.rint((content + np.float32(1)) * np.float32(top / 2)), 0, top)
    pixels = levels.astype(np.uint16).transpose(1, 2, 0)
    return grey_of(pixels)[..., None].repeat(3, axis=2) if grey else pixels
