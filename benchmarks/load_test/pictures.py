"""Inputs of the load test: seeded noise, enlarged so that it has smooth parts."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def array(height: int, width: int, seed: int) -> np.ndarray:
    """Return uint8 pixels [height, width, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def picture(height: int, width: int, seed: int) -> bytes:
    """Return the same as a PNG."""
    out = io.BytesIO()
    Image.fromarray(array(height, width, seed)).save(out, "PNG")
    return out.getvalue()
