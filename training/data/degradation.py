"""LR images made from originals: MATLAB's bicubic, and the blind degradation of Real-ESRGAN.

The blind one (Wang et al. 2021, section 3) runs blur, resize, noise and JPEG twice, the last JPEG before or
after a resize to the LR size and a sinc filter. Images are float [B, 3, H, W] in [0, 1]. Blur kernels, noise
levels and JPEG qualities are drawn for each image, the resize and the kind of noise for each batch, as
published; batches of one therefore give every image its own.
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
    """One round of blur, resize, noise and JPEG: probabilities, and ranges that are drawn from uniformly."""

    blur: float = 1.0
    sinc: float = 0.1  # else one of the six kernels
    # isotropic and anisotropic Gaussian, generalised Gaussian, plateau
    kernels: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sigma_px: Range = (0.2, 3.0)
    generalised_beta: Range = (0.5, 4.0)
    plateau_beta: Range = (1.0, 2.0)
    resize: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize_range: Range = (0.15, 1.5)
    gaussian_noise: float = 0.5  # else Poisson
    noise_sigma: Range = (1.0, 30.0)  # of 255
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
    """The whole degradation; the defaults are Real-ESRGAN's published ones for x4."""

    scale: int = 4
    first: ClassicalDegradation = field(default_factory=ClassicalDegradation)
    second: ClassicalDegradation = field(default_factory=_second)
    final_sinc: float = 0.8

    @classmethod
    def mild(cls, scale: int = 4) -> BlindDegradation:
        """StableSR's published one (Wang et al. 2023): less blur, half the noise, JPEG from quality 60 on.

        The kernels of its second blur, at most 11 pixels wide as published, may here be wider.
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
    """Random numbers from one generator, on its device."""

    generator: torch.Generator

    def uniform(self, low: float, high: float, count: int = 1) -> Tensor:
        """`count` numbers in [low, high)."""
        unit = torch.rand(count, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        return low + (high - low) * unit

    def number(self, low: float, high: float) -> float:
        """One number in [low, high)."""
        return float(self.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.number(0.0, 1.0) < probability

    def choice(self, weights: Sequence[float], count: int = 1) -> Tensor:
        """`count` positions in `weights`, each as likely as its weight."""
        weight = torch.tensor(weights, dtype=torch.float64, device=self.generator.device)
        return torch.multinomial(weight, count, replacement=True, generator=self.generator)

    def beta(self, limits: Range, count: int) -> Tensor:
        """`count` shape parameters: half of them below 1, half above (as published)."""
        low, high = limits
        below = self.uniform(0.0, 1.0, count) < 0.5
        return torch.where(below, self.uniform(low, 1.0, count), self.uniform(1.0, high, count))

    def sides(self, count: int) -> Tensor:
        """`count` sides of kernels: odd, from 7 to 21 pixels."""
        return 7 + 2 * self.choice((1.0,) * 8, count)

    def qualities(self, limits: tuple[int, int], count: int) -> list[int]:
        """`count` JPEG qualities, both limits included."""
        low, high = limits
        return [int(q) for q in self.uniform(low, high + 1, count)]


def bicubic(hr: Tensor, scale: int) -> Tensor:
    """MATLAB's `imresize` by 1/scale on the image in 8 bits: [B, 3, H, W] -> [B, 3, H/scale, W/scale]."""
    _check(hr, scale)
    height, width = hr.shape[2] // scale, hr.shape[3] // scale
    resized = [imresize(image, height, width) for image in _to_bytes(hr)]
    return _from_bytes(resized, hr)


def degrade_blind(hr: Tensor, config: BlindDegradation, generator: torch.Generator) -> Tensor:
    """Degrade [B, 3, H, W] to [B, 3, H/scale, W/scale], on the device of `hr`, in steps of 1/255.

    Every draw comes from `generator`, which may live on another device: one on the CPU gives the same draws
    wherever the images are. H and W must be multiples of the scale, else ValueError.
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
    """Blur, resize relative to the size `base`, and noise."""
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
    """Resize to (height, width) in a random mode; without antialiasing, as published."""
    mode = _MODES[int(draw.choice((1.0, 1.0, 1.0)))]
    return F.interpolate(x, size, mode=mode)


def blur_kernels(model: ClassicalDegradation, count: int, draw: Draw) -> Tensor:
    """Random kernels [count, 21, 21] of one round, float64, each summing to 1 (sections 3.1, 3.3)."""
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
    lowest = torch.where(sides < 13, math.pi / 3, math.pi / 5)  # a small kernel cannot cut as low
    cutoff = lowest + (math.pi - lowest) * draw.uniform(0.0, 1.0, count)
    is_sinc = draw.uniform(0.0, 1.0, count) < model.sinc
    bells = bell_kernels(sides, sigma_x, sigma_y, angle, beta, plateau)
    return torch.where(is_sinc[:, None, None], sinc_kernels(sides, cutoff), bells)


def final_kernels(count: int, probability: float, draw: Draw) -> Tensor:
    """The last filter [count, 21, 21]: a sinc with this probability, else the identity."""
    kernels = sinc_kernels(draw.sides(count), draw.uniform(math.pi / 3, math.pi, count))
    identity = torch.zeros_like(kernels)
    identity[:, REACH, REACH] = 1.0
    is_sinc = draw.uniform(0.0, 1.0, count) < probability
    return torch.where(is_sinc[:, None, None], kernels, identity)


def gaussian_noise(x: Tensor, sigma: Tensor, grey: Tensor, generator: torch.Generator) -> Tensor:
    """Add normal noise of `sigma` [B] of 255, equal in all channels where `grey` [B]; clipped to [0, 1]."""
    noise = torch.randn(x.shape, generator=generator, device=generator.device)
    noise = torch.where(_each(grey), noise[:, :1], noise) * _each(sigma / 255.0)
    return (x + noise.to(x)).clamp(0.0, 1.0)


def poisson_noise(x: Tensor, scale: Tensor, grey: Tensor, generator: torch.Generator) -> Tensor:
    """Add `scale` [B] times shot noise, that of the grey image where `grey` [B]; clipped to [0, 1].

    The counts for white are, as published, the number of values that occur in the image in 8 bits, rounded up
    to a power of two.
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
    """Float [B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3], rounded and clipped."""
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
