"""Photographs to training crops: every sample is a function of (seed, index), so that any run can be resumed exactly."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from moesr.runtime.errors import InputError
from moesr.runtime.resize import imresize

log = logging.getLogger(__name__)
CACHED_IMAGES = 256  # decoded photographs kept in memory by each loader process


def find_photographs(folder: Path, minimum_px: int) -> list[Path]:
    """List the readable images under `folder` with both sides of at least `minimum_px`, sorted.

    Files that are no images are passed over; damaged and too small ones are reported. Raises InputError where
    nothing is left.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a directory; expected a folder of photographs")
    extensions = set(Image.registered_extensions())
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in extensions):
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            log.warning("%s: skipped, cannot be read (%s)", path, error)
            continue
        if min(image.size) < minimum_px:
            log.warning("%s: skipped, %dx%d is smaller than a crop of %d px", path, *image.size, minimum_px)
            continue
        found.append(path)
    if not found:
        raise InputError(f"{folder}: no readable image of at least {minimum_px} px; add photographs")
    return found


@lru_cache(maxsize=CACHED_IMAGES)
def load_rgb(path: Path) -> np.ndarray:
    """Decode a photograph to uint8 [H, W, 3], upright."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


class Crops(Dataset[tuple[Tensor, ...]]):
    """HR crops, uint8 [3, patch, patch]; drawn photograph, place, flip and transposition."""

    def __init__(self, paths: list[Path], patch_px: int, seed: int) -> None:
        self.paths, self.patch_px, self.seed = paths, patch_px, seed

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return sample `index`, any non-negative integer."""
        return (self.crop(index),)

    def crop(self, index: int) -> Tensor:
        """Return the pixels of sample `index`."""
        draw = np.random.default_rng((self.seed, index))
        image = load_rgb(self.paths[draw.integers(len(self.paths))])
        y, x = (int(draw.integers(0, side - self.patch_px + 1)) for side in image.shape[:2])
        pixels = image[y : y + self.patch_px, x : x + self.patch_px]
        flip_y, flip_x, transpose = draw.integers(0, 2, size=3)
        pixels = pixels[:: 1 - 2 * flip_y, :: 1 - 2 * flip_x]
        pixels = pixels.transpose(1, 0, 2) if transpose else pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def crops(self, first: int, count: int) -> Tensor:
        """Return samples `first` .. `first + count - 1`, uint8 [count, 3, patch, patch]."""
        return torch.stack([self.crop(i) for i in range(first, first + count)])


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def resize_batch(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 [B, 3, H, W] with MATLAB's bicubic and its rounding -> uint8 [B, 3, height, width]."""
    images = [imresize(p.permute(1, 2, 0).numpy(), height, width) for p in pixels]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
