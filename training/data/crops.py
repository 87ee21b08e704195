"""Training crops of photographs. A sample is a function of (seed, index), so runs resume exactly."""

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
from moesr.training.seeded_random import DEGRADATION, SampleRng

TRIES = 100  # number of photographs drawn before giving up on finding a readable one


@dataclass(frozen=True)
class Degradation:
    """Makes LR images by MATLAB's bicubic resize or by a blind degradation drawn for every sample.

    `kind` is "bicubic", "blind" (Real-ESRGAN's degradation) or "mild" (StableSR's). With the last two, the
    fraction `bicubic_share` (0 to 1) of the samples is degraded by bicubic resize only.
    """

    kind: str
    scale: int
    seed: int
    bicubic_share: float = 0.0

    def __call__(self, hr: Tensor, indices: Tensor) -> Tensor:
        """HR uint8 [B, 3, P, P], sample numbers [B] -> LR uint8 [B, 3, P/scale, P/scale], same device."""
        if self.kind == "bicubic":
            return self._bicubic(hr)
        # One image at a time: every random choice then belongs to the sample, not to the batch it is in.
        generators = SampleRng(self.seed, DEGRADATION, indices.tolist()).generators
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
    """HR crops with their sample numbers and, if a `degradation` is given, their LR images."""

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
        """Return the same crops with LR images."""
        return Crops(self.paths, self.patch_px, self.seed, degradation, augmentation=self.augmentation)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return the number, HR uint8 [3, P, P] and, with a degradation, LR of sample `index` (any >= 0)."""
        number, hr = torch.tensor(index), self.crop(index)
        if self.degradation is None:
            return number, hr
        return number, hr, self.degradation(hr[None], number[None])[0]

    def crop(self, index: int) -> Tensor:
        """Return HR uint8 [3, P, P] of sample `index`: a random crop of a random photograph, augmented."""
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
        """Return HR of samples `first` .. `first + count - 1`, uint8 [count, 3, P, P]."""
        return torch.stack([self.crop(i) for i in range(first, first + count)])

    def _photograph(self, draw: np.random.Generator) -> np.ndarray:
        for _ in range(TRIES):
            image = decoded.load(self.paths[draw.integers(len(self.paths))])
            if image is not None and min(image.shape[:2]) >= self.patch_px:
                return image
        raise InputError(f"{self.paths[0].parent}: {TRIES} photographs in a row are damaged; replace them")


def detail(pixels: np.ndarray) -> float:
    """Return the mean absolute difference of green between neighboring pixels of a uint8 image [H, W, 3]."""
    green = pixels[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def resize_batch(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize square uint8 images [B, 3, S, S] as `imresize` does, on their device: [B, 3, height, width]."""
    rows = _matrix(pixels.shape[-2], height).to(pixels.device)
    columns = _matrix(pixels.shape[-1], width).to(pixels.device)
    x = (rows @ pixels.double()).round().clamp(0.0, 255.0)
    return (x @ columns.T).round().clamp(0.0, 255.0).byte()


@lru_cache(maxsize=16)
def _matrix(size: int, out_size: int) -> Tensor:
    """Return the matrix that `imresize` applies along one axis, float64 [out_size, size]."""
    return torch.from_numpy(imresize(np.eye(size, dtype=np.float32), out_size, size)).double()


def condition(lr: Tensor, scale: int, factor: int) -> Tensor:
    """Resize LR uint8 [B, 3, l, l] to the latent grid: the condition of the UNet, float32 in [-1, 1]."""
    side = lr.shape[-1] * scale // factor
    return to_float(lr if side == lr.shape[-1] else resize_batch(lr, side, side))
