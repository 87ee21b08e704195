"""Image files that are made in memory."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def picture(height: int = 20, width: int = 24, kind: str = "PNG", seed: int = 0) -> bytes:
    """Return an image file with seeded noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
