"""Losses of decoder training beyond per-pixel ones (paper section 3.3: frequency compensation)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

COLOUR_PX = 8  # side of the areas whose mean colours are compared


def colour_loss(pred: Tensor, target: Tensor) -> Tensor:
    """L1 between the mean colours of areas of 8x8 pixels of two image batches [B, 3, H, W]: a scalar.

    Not of the papers: pixel losses hardly see hues, and a narrow network drops them first.
    """
    return F.l1_loss(F.avg_pool2d(pred, COLOUR_PX), F.avg_pool2d(target, COLOUR_PX))


def focal_frequency_loss(
    pred: Tensor, target: Tensor, alpha: float = 1.0, log_matrix: bool = False
) -> Tensor:
    """Focal frequency loss (Jiang et al., ICCV 2021, Eq. 8-9): spectral distance, hard bins weighted up.

    `pred` and `target` are images [B, C, H, W] of equal shape, any size and range; half types are computed in
    float32. The spectra are orthonormal 2-D FFTs of every image and channel. Returns the scalar mean over
    B, C, H, W of `w |F_pred - F_target|^2`; `alpha` 0 makes it the plain mean squared error (Parseval).
    Raises ValueError where the shapes differ.
    """
    if pred.shape != target.shape or pred.ndim != 4:
        raise ValueError(
            "expected two batches of images [B, C, H, W] of equal shape; "
            f"got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    if pred.dtype in (torch.float16, torch.bfloat16):
        pred, target = pred.float(), target.float()  # no half FFT on a CPU, and only some sizes on a GPU
    # linear: F_pred - F_target
    spectrum = torch.view_as_real(torch.fft.fft2(pred - target, norm="ortho"))
    distance = spectrum.square().sum(dim=-1)  # [B, C, H, W]
    return (spectral_weights(distance, alpha, log_matrix) * distance).mean()


@torch.no_grad()
def spectral_weights(distance: Tensor, alpha: float, log_matrix: bool = False) -> Tensor:
    """Weights `w = |F_pred - F_target|^alpha` scaled to peak at 1 in each image and channel (Eq. 8).

    `distance` is the squared modulus [B, C, H, W]. `log_matrix` takes log(1 + w) before the scaling. The
    weights are in [0, 1], constants to the gradient, and 0 where two images are equal.
    """
    weights = distance.sqrt().pow(alpha)
    if log_matrix:
        weights = weights.log1p()
    peak = weights.amax(dim=(-2, -1), keepdim=True)
    return weights / peak.clamp_min(torch.finfo(weights.dtype).tiny)
