"""Degradations that make LR images: MATLAB's bicubic resize and Real-ESRGAN's blind degradation.

The blind degradation (Wang et al. 2021, section 3) applies blur, resize, noise and JPEG twice; the second
JPEG comes before or after a resize to the LR size and a sinc filter. Images are float [B, 3, H, W] in [0, 1].
As published, blur kernels, noise levels and JPEG qualities are drawn per image, but the resize and the kind
of noise per batch. With a batch size of one every choice is per image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from moesr.runtime.images.resize import imresize
from moesr.training.data.blur import REACH, bell_kernels, filter2d, sinc_kernels

_MODES = ("area", "bilinear", "bicubic")
_GREY = (0.299, 0.587, 0.114)

Range = tuple[float, float]


@dataclass(frozen=True)
class ClassicalDegradation:
    """Parameters of one round of blur, resize, noise and JPEG: probabilities and ranges of uniform draws."""

    blur: float = 1.0
    sinc: float = 0.1  # probability of a sinc kernel; otherwise one of the six kernels below
    # Probabilities of the Gaussian, generalised Gaussian and plateau kernels, each isotropic and anisotropic.
    kernels: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sigma_px: Range = (0.2, 3.0)
    generalised_beta: Range = (0.5, 4.0)
    plateau_beta: Range = (1.0, 2.0)
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize_range: Range = (0.15, 1.5)
    gaussian_noise: float = 0.5  # probability of Gaussian noise; otherwise Poisson noise
    noise_sigma: Range = (1.0, 30.0)  # in 8-bit levels
    poisson_scale: Range = (0.05, 3.0)
    grey_noise: float = 0.4
    jpeg_quality: tuple[int, int] = (30, 95)


def _second() -> ClassicalDegradation:
    return ClassicalDegradation(
        blur=0.8,
        sigma_px=(0.2, 1.5),
        resize=(0.3, 0.4, 0.3),
        resize_range=(0.3, 1.2),
        noise_sigma=(1.0, 25.0),
        poisson_scale=(0.05, 2.5),
    )


@dataclass(frozen=True)
class BlindDegradation:
    """Parameters of the whole blind degradation; the defaults are Real-ESRGAN's published values for x4."""

    scale: int = 4
    first: ClassicalDegradation = field(default_factory=ClassicalDegradation)
    second: ClassicalDegradation = field(default_factory=_second)
    final_sinc: float = 0.8

    @classmethod
    def mild(cls, scale: int = 4) -> BlindDegradation:
        """StableSR's published degradation (Wang et al. 2023): less blur, half the noise, JPEG quality >= 60.

        Its second blur has kernels of at most 11 pixels as published; here they may be wider.
        """
        first = ClassicalDegradation(
            sigma_px=(0.2, 1.5),
            resize_range=(0.3, 1.5),
            noise_sigma=(1.0, 15.0),
            poisson_scale=(0.05, 2.0),
            jpeg_quality=(60, 95),
            generalised_beta=(0.5, 2.0),
            plateau_beta=(1.0, 1.5),
        )
        second = ClassicalDegradation(
            blur=0.5,
            sigma_px=(0.2, 1.0),
            resize=(0.3, 0.4, 0.3),
            resize_range=(0.6, 1.2),
            noise_sigma=(1.0, 12.0),
            poisson_scale=(0.05, 1.0),
            jpeg_quality=(60, 100),
            generalised_beta=(0.5, 2.0),
            plateau_beta=(1.0, 1.5),
        )
        return cls(scale, first, second)


@dataclass(frozen=True)
class Draw:
    """Draws random numbers from one generator, on the generator's device."""

    generator: torch.Generator

    def uniform(self, low: float, high: float, count: int = 1) -> Tensor:
        """Draw `count` numbers uniformly from [low, high)."""
        unit = torch.rand(count, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        return low + (high - low) * unit

    def number(self, low: float, high: float) -> float:
        """Draw one number uniformly from [low, high)."""
        return float(self.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.number(0.0, 1.0) < probability

    def choice(self, weights: Sequence[float], count: int = 1) -> Tensor:
        """Draw `count` indices of `weights`; each index has a probability proportional to its weight."""
        weight = torch.tensor(weights, dtype=torch.float64, device=self.generator.device)
        return torch.multinomial(weight, count, replacement=True, generator=self.generator)

    def beta(self, limits: Range, count: int) -> Tensor:
        """Draw `count` shape parameters; each is below or above 1 with equal probability (as published)."""
        low, high = limits
        below = self.uniform(0.0, 1.0, count) < 0.5
        return torch.where(below, self.uniform(low, 1.0, count), self.uniform(1.0, high, count))

    def sides(self, count: int) -> Tensor:
        """Draw `count` odd kernel sides from 7 to 21 pixels."""
        return 7 + 2 * self.choice((1.0,) * 8, count)

    def qualities(self, limits: tuple[int, int], count: int) -> list[int]:
        """Draw `count` JPEG qualities; both limits are included."""
        low, high = limits
        return [int(q) for q in self.uniform(low, high + 1, count)]


def bicubic(hr: Tensor, scale: int) -> Tensor:
    """Apply MATLAB's `imresize` by 1/scale to 8-bit pixels: [B, 3, H, W] -> [B, 3, H/scale, W/scale]."""
    _check(hr, scale)
    height, width = hr.shape[2] // scale, hr.shape[3] // scale
    resized = [imresize(image, height, width) for image in _to_bytes(hr)]
    return _from_bytes(resized, hr)


def degrade_blind(hr: Tensor, config: BlindDegradation, generator: torch.Generator) -> Tensor:
    """Degrade [B, 3, H, W] to [B, 3, H/scale, W/scale], on the device of `hr`, rounded to multiples of 1/255.

    All random numbers come from `generator`, which may be on another device than the images: a generator on
    the CPU gives the same numbers for every device. Raises ValueError unless H and W are multiples of the
    scale.
    """
    _check(hr, config.scale)
    draw, batch, height, width = Draw(generator), len(hr), hr.shape[2], hr.shape[3]
    small = height // config.scale, width // config.scale
    x = _distort(hr, config.first, (height, width), draw)
    x = jpeg(x, draw.qualities(config.first.jpeg_quality, batch))
    x = _distort(x, config.second, small, draw)
    kernels = final_kernels(batch, config.final_sinc, draw)
    quality = draw.qualities(config.second.jpeg_quality, batch)
    if draw.chance(0.5):
        x = jpeg(filter2d(_resize(x, small, draw), kernels), quality)
    else:
        x = filter2d(_resize(jpeg(x, quality), small, draw), kernels)
    return (x.clamp(0.0, 1.0) * 255.0).round() / 255.0


def _distort(x: Tensor, model: ClassicalDegradation, base: tuple[int, int], draw: Draw) -> Tensor:
    """Blur an image, resize it by a factor relative to the size `base`, and add noise."""
    if draw.chance(model.blur):
        x = filter2d(x, blur_kernels(model, len(x), draw))
    low, high = model.resize_range
    limits = ((1.0, high), (low, 1.0), (1.0, 1.0))[int(draw.choice(model.resize))]  # up, down, keep
    factor = draw.number(*limits)
    x = _resize(x, (max(1, int(base[0] * factor)), max(1, int(base[1] * factor))), draw)
    grey = draw.uniform(0.0, 1.0, len(x)) < model.grey_noise
    if draw.chance(model.gaussian_noise):
        return gaussian_noise(x, draw.uniform(*model.noise_sigma, len(x)), grey, draw.generator)
    return poisson_noise(x, draw.uniform(*model.poisson_scale, len(x)), grey, draw.generator)


def _resize(x: Tensor, size: tuple[int, int], draw: Draw) -> Tensor:
    """Resize to (height, width) with a random interpolation, without antialiasing (as published)."""
    mode = _MODES[int(draw.choice((1.0, 1.0, 1.0)))]
    return F.interpolate(x, size, mode=mode)


def blur_kernels(model: ClassicalDegradation, count: int, draw: Draw) -> Tensor:
    """Draw kernels [count, 21, 21] of one round, float64, each summing to 1 (sections 3.1, 3.3)."""
    kind = draw.choice(model.kernels, count)
    sigma_x, sigma_y = draw.uniform(*model.sigma_px, count), draw.uniform(*model.sigma_px, count)
    angle = draw.uniform(-math.pi, math.pi, count)
    isotropic, plateau = kind % 2 == 0, kind >= 4
    beta = torch.where(
        plateau, draw.beta(model.plateau_beta, count), draw.beta(model.generalised_beta, count)
    )
    beta = torch.where(kind < 2, 1.0, beta)
    sigma_y, angle = torch.where(isotropic, sigma_x, sigma_y), torch.where(isotropic, 0.0, angle)
    sides = draw.sides(count)
    lowest = torch.where(sides < 13, math.pi / 3, math.pi / 5)  # the lowest cutoff of a small kernel
    cutoff = lowest + (math.pi - lowest) * draw.uniform(0.0, 1.0, count)
    is_sinc = draw.uniform(0.0, 1.0, count) < model.sinc
    bells = bell_kernels(sides, sigma_x, sigma_y, angle, beta, plateau)
    return torch.where(is_sinc[:, None, None], sinc_kernels(sides, cutoff), bells)


def final_kernels(count: int, probability: float, draw: Draw) -> Tensor:
    """Draw kernels [count, 21, 21] of the last filter: a sinc with this probability, else the identity."""
    kernels = sinc_kernels(draw.sides(count), draw.uniform(math.pi / 3, math.pi, count))
    identity = torch.zeros_like(kernels)
    identity[:, REACH, REACH] = 1.0
    is_sinc = draw.uniform(0.0, 1.0, count) < probability
    return torch.where(is_sinc[:, None, None], kernels, identity)


def gaussian_noise(x: Tensor, sigma: Tensor, grey: Tensor, generator: torch.Generator) -> Tensor:
    """Add normal noise of deviation `sigma` [B] in 8-bit levels and clip to [0, 1].

    The noise of an image is equal in all channels if its entry of `grey` [B] is set.
    """
    noise = torch.randn(x.shape, generator=generator, device=generator.device)
    noise = torch.where(_each(grey), noise[:, :1], noise) * _each(sigma / 255.0)
    return (x + noise.to(x)).clamp(0.0, 1.0)


def poisson_noise(x: Tensor, scale: Tensor, grey: Tensor, generator: torch.Generator) -> Tensor:
    """Add `scale` [B] times shot noise, that of the gray image if `grey` [B] is set; clip to [0, 1].

    As published, a white pixel has an expected count of the number of distinct 8-bit values in the image,
    rounded up to a power of two.
    """
    clean = (x.clamp(0.0, 1.0) * 255.0).round().to(generator.device) / 255.0
    luma = (clean * clean.new_tensor(_GREY)[:, None, None]).sum(dim=1, keepdim=True)
    luma = (luma * 255.0).round() / 255.0
    noise = torch.where(_each(grey), _shot_noise(luma, generator), _shot_noise(clean, generator))
    return (x + (noise * _each(scale)).to(x)).clamp(0.0, 1.0)


def _shot_noise(clean: Tensor, generator: torch.Generator) -> Tensor:
    levels = clean.new_tensor([2.0 ** math.ceil(math.log2(len(image.unique()))) for image in clean])
    counts = _each(levels)
    return torch.poisson(clean * counts, generator=generator) / counts - clean


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def jpeg(x: Tensor, qualities: Sequence[int]) -> Tensor:
    """Compress and decompress each image of [B, 3, H, W] at its quality (1 to 100), with Pillow's codec."""
    decoded = []
    for pixels, quality in zip(_to_bytes(x), qualities, strict=True):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(stream)))
    return _from_bytes(decoded, x)


def _to_bytes(x: Tensor) -> np.ndarray:
    """Convert float [B, 3, H, W] in [0, 1] to uint8 [B, H, W, 3], rounded and clipped."""
    return (x.clamp(0.0, 1.0) * 255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _from_bytes(images: Sequence[np.ndarray], like: Tensor) -> Tensor:
    stacked = torch.from_numpy(np.stack(images)).to(like.device)
    return stacked.permute(0, 3, 1, 2).to(like.dtype) / 255.0


def _check(hr: Tensor, scale: int) -> None:
    if (
        hr.ndim != 4
        or hr.shape[1] != 3
        or hr.shape[2] % scale
        or hr.shape[3] % scale
        or not hr.is_floating_point()
    ):
        raise ValueError(
            f"expected float images [B, 3, H, W] with sides that are multiples of {scale}; "
            f"got {hr.dtype} {tuple(hr.shape)}"
        )
