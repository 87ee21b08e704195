"""Photographs to training crops: a sample is a function of (seed, index), so runs resume exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moesr.runtime.errors import InputError
from moesr.runtime.images.resize import imresize
from moesr.training.data.degradation import BlindDegradation, degrade_blind
from moesr.training.data.photographs import decoded
from moesr.training.recipe import Augmentation
from moesr.training.seeded_random import DEGRADATION, Draws

TRIES = 100  # photographs drawn in search of a readable one


@dataclass(frozen=True)
class Degradation:
    """How LR images are made: MATLAB's bicubic, or a blind degradation drawn for every sample.

    The `kind` "blind" is Real-ESRGAN's, "mild" StableSR's. Of the blind ones, `bicubic_share` (0 to 1) are
    bicubic all the same.
    """

    kind: str
    scale: int
    seed: int
    bicubic_share: float = 0.0

    def __call__(self, hr: Tensor, indices: Tensor) -> Tensor:
        """HR crops uint8 [B, 3, P, P] and their numbers -> LR uint8 [B, 3, P/scale, P/scale], same device."""
        if self.kind == "bicubic":
            return self._bicubic(hr)
        # batches of one: what is drawn for a batch is then drawn for a sample, whatever batch it is in
        generators = Draws(self.seed, DEGRADATION, indices.tolist()).generators
        return torch.cat([self._blind(hr[i : i + 1], g) for i, g in enumerate(generators)])

    def _bicubic(self, hr: Tensor) -> Tensor:
        side = hr.shape[-1] // self.scale
        return resize_batch(hr, side, side)

    def _blind(self, hr: Tensor, generator: torch.Generator) -> Tensor:
        if self.bicubic_share and float(torch.rand(1, generator=generator)) < self.bicubic_share:
            return self._bicubic(hr)
        config = BlindDegradation.mild(self.scale) if self.kind == "mild" else BlindDegradation(self.scale)
        lr = degrade_blind(hr.float() / 255.0, config, generator)
        return (lr * 255.0).round().byte()


class Crops(Dataset[tuple[Tensor, ...]]):
    """HR crops with their numbers; with a `degradation` LR images too, made where the crops are loaded."""

    def __init__(
        self,
        paths: list[Path],
        patch_px: int,
        seed: int,
        degradation: Degradation | None = None,
        *,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.paths, self.patch_px, self.seed, self.degradation = paths, patch_px, seed, degradation
        self.augmentation = augmentation or Augmentation()

    def with_lr(self, degradation: Degradation) -> Crops:
        """The same crops with LR images."""
        return Crops(self.paths, self.patch_px, self.seed, degradation, augmentation=self.augmentation)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Sample `index` (from 0, without end): its number, HR uint8 [3, P, P], LR where it is made here."""
        number, hr = torch.tensor(index), self.crop(index)
        if self.degradation is None:
            return number, hr
        return number, hr, self.degradation(hr[None], number[None])[0]

    def crop(self, index: int) -> Tensor:
        """Pixels of sample `index`: drawn photograph, size, place, flip, transposition, colors, contrast."""
        draw, augmentation = np.random.default_rng((self.seed, index)), self.augmentation
        image = self._photograph(draw)
        cut = self.patch_px
        if augmentation.smallest_size < 1.0:
            cut = min(round(cut / draw.uniform(augmentation.smallest_size, 1.0)), *image.shape[:2])
        places = [
            tuple(int(draw.integers(0, side - cut + 1)) for side in image.shape[:2])
            for _ in range(augmentation.candidates)
        ]
        choices = [image[y : y + cut, x : x + cut] for y, x in places]
        pixels = max(choices, key=detail) if len(choices) > 1 else choices[0]
        flip_y, flip_x, transpose = draw.integers(0, 2, size=3)
        pixels = pixels[:: 1 - 2 * flip_y, :: 1 - 2 * flip_x]
        pixels = pixels.transpose(1, 0, 2) if transpose else pixels
        pixels = pixels[..., draw.permutation(3)] if augmentation.shuffle_channels else pixels
        pixels = pixels if cut == self.patch_px else imresize(pixels, self.patch_px, self.patch_px)
        if augmentation.least_contrast < 1.0:
            mean = pixels.mean(axis=(0, 1))
            contrast = draw.uniform(augmentation.least_contrast, 1.0)
            pixels = np.rint(mean + contrast * (pixels - mean)).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def crops(self, first: int, count: int) -> Tensor:
        """Pixels of samples `first` .. `first + count - 1`, uint8 [count, 3, P, P]."""
        return torch.stack([self.crop(i) for i in range(first, first + count)])

    def _photograph(self, draw: np.random.Generator) -> np.ndarray:
        for _ in range(TRIES):
            image = decoded.load(self.paths[draw.integers(len(self.paths))])
            if image is not None and min(image.shape[:2]) >= self.patch_px:
                return image
        raise InputError(f"{self.paths[0].parent}: {TRIES} photographs in a row are damaged; replace them")


def detail(pixels: np.ndarray) -> float:
    """Mean difference of green between neighbours in uint8 pixels [H, W, 3]."""
    green = pixels[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def resize_batch(pixels: Tensor, height: int, width: int) -> Tensor:
    """`imresize` of square uint8 [B, 3, S, S] on their device -> uint8 [B, 3, height, width]."""
    rows = _matrix(pixels.shape[-2], height).to(pixels.device)
    columns = _matrix(pixels.shape[-1], width).to(pixels.device)
    x = (rows @ pixels.double()).round().clamp(0.0, 255.0)
    return (x @ columns.T).round().clamp(0.0, 255.0).byte()


@lru_cache(maxsize=16)
def _matrix(size: int, out_size: int) -> Tensor:
    """What `imresize` does along an axis, float64 [out_size, size]."""
    return torch.from_numpy(imresize(np.eye(size, dtype=np.float32), out_size, size)).double()


def condition(lr: Tensor, scale: int, factor: int) -> Tensor:
    """LR uint8 [B, 3, l, l] -> the condition on the latent grid, float32 in [-1, 1]."""
    side = lr.shape[-1] * scale // factor
    return to_float(lr if side == lr.shape[-1] else resize_batch(lr, side, side))
