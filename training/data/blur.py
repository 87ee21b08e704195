"""Blur kernels of the blind degradation, and the filter that applies one kernel per image (Wang et al. 2021).

Kernels are float64 and stored on a canvas of 21 x 21 pixels; their own odd side may be smaller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

REACH = 10  # pixels from the centre of a kernel's canvas to its edge


def bell_kernels(
    sides: Tensor, sigma_x: Tensor, sigma_y: Tensor, angle: Tensor, beta: Tensor, plateau: Tensor
) -> Tensor:
    """Build kernels [N, 21, 21] from vectors [N], zero outside `sides` x `sides`, each summing to 1.

    Let q be the squared distance in units of sigma along axes rotated by `angle` (radians). A kernel is
    exp(-q^beta / 2), which is a Gaussian for beta 1, or 1 / (1 + q^beta) if `plateau` is set for it.
    """
    y, x = _grid(sides)
    cos, sin = (f(angle)[:, None, None] for f in (torch.cos, torch.sin))
    along, across = (cos * x + sin * y) / sigma_x[:, None, None], (cos * y - sin * x) / sigma_y[:, None, None]
    q = (along**2 + across**2) ** beta[:, None, None]
    return _normalised(torch.where(plateau[:, None, None], 1 / (1 + q), torch.exp(-q / 2)), sides)


def sinc_kernels(sides: Tensor, cutoff: Tensor) -> Tensor:
    """Build circular low-pass kernels [N, 21, 21] that cut at `cutoff` [N] radians per pixel.

    A kernel is `cutoff J1(cutoff r) / (2 pi r)`, zero outside `sides` x `sides`, scaled to sum to 1. It
    causes ringing as in sharpened photographs.
    """
    y, x = _grid(sides)
    radius, omega = torch.hypot(x, y), cutoff[:, None, None]
    safe = radius.clamp_min(1.0)  # r = 0 is replaced by the limit below
    kernels = omega * torch.special.bessel_j1(omega * safe) / (2 * math.pi * safe)
    return _normalised(torch.where(radius == 0, omega**2 / (4 * math.pi), kernels), sides)


def _grid(sides: Tensor) -> tuple[Tensor, Tensor]:
    axis = torch.arange(-REACH, REACH + 1, dtype=torch.float64, device=sides.device)
    return axis[:, None], axis[None]


def _normalised(kernels: Tensor, sides: Tensor) -> Tensor:
    y, x = _grid(sides)
    inside = torch.maximum(y.abs(), x.abs()) <= sides[:, None, None] // 2
    kernels = kernels * inside
    return kernels / kernels.sum(dim=(1, 2), keepdim=True)


def filter2d(x: Tensor, kernels: Tensor) -> Tensor:
    """Filter each image of [B, C, H, W] with its own kernel of [B, 21, 21]; edges are mirrored."""
    batch, _, height, width = x.shape
    # Reflection needs more pixels than the padding has.
    mode = "reflect" if min(height, width) > REACH else "replicate"
    padded = F.pad(x, (REACH,) * 4, mode=mode).transpose(0, 1)  # [C, B, H, W]: one group per image
    weight = kernels.to(x.device, x.dtype)[:, None]
    return F.conv2d(padded, weight, groups=batch).transpose(0, 1)
