"""Losses of the autoencoder and the decoder on images (paper section 3.3: frequency compensation)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moesr.training.recipe import AutoencoderStage, DecoderStage

COLOR_PX = 8  # side of the areas whose mean colors are compared
GMS_STABILISER = 170.0  # Xue et al. 2014, for luma in 0..255
ROUNDING = 1e-5  # approximate power of 8-bit rounding noise per frequency bin; weaker power is invisible
EPSILON = 1e-6  # keeps the gradient of the square root finite in flat areas
LUMA = (65.481 / 255.0, 128.553 / 255.0, 24.966 / 255.0)  # BT.601 in studio range, as for PSNR


def pixel_loss(
    pred: Tensor,
    target: Tensor,
    stage: AutoencoderStage | DecoderStage,
    figures: dict[str, Tensor],
    decoded: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of the per-pixel, color and gradient losses of images [B, 3, H, W].

    The weights are those of `stage`; each loss is also stored in `figures`. If `pred` is color-corrected, the
    color loss uses `decoded`, the image before the correction.
    """
    figures["l1"] = F.l1_loss(pred, target)
    total = stage.l1_weight * figures["l1"]
    if stage.mse_weight:
        figures["mse"] = F.mse_loss(pred, target)
        total = total + stage.mse_weight * figures["mse"]
    if stage.color_weight:
        figures["color"] = color_loss(pred if decoded is None else decoded, target)
        total = total + stage.color_weight * figures["color"]
    if stage.gradient_weight:
        figures["gradient"] = gradient_loss(pred, target)
        total = total + stage.gradient_weight * figures["gradient"]
    return total


def frequency_loss(
    pred: Tensor, target: Tensor, stage: AutoencoderStage | DecoderStage, figures: dict[str, Tensor]
) -> Tensor:
    """Return the focal frequency loss weighted by `stage`, and store it in `figures`; 0 without a weight."""
    if not stage.frequency_weight:
        return pred.new_zeros(())
    figures["ffl"] = focal_frequency_loss(pred, target)
    return stage.frequency_weight * figures["ffl"]


def spectrum_distance(pred: Tensor, target: Tensor) -> Tensor:
    """Return one minus the correlation of the log power spectra of two image batches [B, C, H, W]: 0 to 2.

    The spectra are orthonormal 2-D FFTs of every image and channel. This loss is not from the papers. Pixel
    losses and the focal frequency loss reward fading uncertain detail until its spectrum has lost its shape.
    This loss rewards the right shape of the spectrum, regardless of phase and overall strength, and costs
    little PSNR.
    """
    spectra = (torch.fft.rfft2(image.float(), norm="ortho") for image in (pred, target))
    power = (torch.view_as_real(bins).square().sum(dim=-1).flatten(2) for bins in spectra)
    a, b = ((bins + ROUNDING).log() for bins in power)
    a, b = (logs - logs.mean(dim=2, keepdim=True) for logs in (a, b))
    return (1.0 - F.cosine_similarity(a, b, dim=2)).mean()


def color_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Return the L1 distance of the mean colors of areas of 8x8 pixels in two image batches [B, 3, H, W].

    This loss is not from the papers. Pixel losses hardly respond to hue, so narrow networks lose hues first.
    """
    return F.l1_loss(F.avg_pool2d(pred, COLOR_PX), F.avg_pool2d(target, COLOR_PX))


def energy_distance(pred: Tensor, target: Tensor) -> Tensor:
    """Return the distance of the local energy of detail in two batches: [B, 3, H, W] -> [B, 3, H/8, W/8].

    Detail is the difference of an image and its mean over 3x3 pixels; its energy is the root mean square over
    areas of 8x8 pixels. This loss is not from the papers. Pixel losses blur detail that the latent cannot
    place exactly; this loss compares only the amount of detail, not its place.
    """
    a, b = ((image - F.avg_pool2d(image, 3, 1, 1)).square() for image in (pred, target))
    a, b = ((F.avg_pool2d(energy, COLOR_PX) + EPSILON).sqrt() for energy in (a, b))
    return (a - b).abs()


def gradient_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Return one minus the mean gradient magnitude similarity of luma (Xue et al. 2014, Eq. 4-5): 0 to 1.

    `pred` and `target` are RGB batches [B, 3, H, W] in [-1, 1]. As published, gradients are computed with the
    Prewitt operator at half size.
    """
    a, b = (_squared_gradient(image) for image in (pred, target))
    product = 2.0 * (a * b + EPSILON).sqrt()
    return 1.0 - ((product + GMS_STABILISER) / (a + b + GMS_STABILISER)).mean()


def _squared_gradient(image: Tensor) -> Tensor:
    """Return the squared gradient magnitude [B, h, w] of luma in 0..255, without a border of one pixel."""
    luma = 127.5 * (image * image.new_tensor(LUMA)[:, None, None]).sum(dim=1)
    half = F.avg_pool2d(luma, 2)
    # Sums of slices in place of a convolution, which autocast would compute in bf16.
    rows = half[:, :-2] + half[:, 1:-1] + half[:, 2:]
    columns = half[..., :-2] + half[..., 1:-1] + half[..., 2:]
    across, down = rows[..., 2:] - rows[..., :-2], columns[:, 2:] - columns[:, :-2]
    return (across.square() + down.square()) / 9.0


def wavelet_colors(content: Tensor, style: Tensor, levels: int = 5) -> Tensor:
    """Apply a differentiable `moesr.runtime.images.color.wavelet` to image batches [B, C, H, W]."""
    low = style - content
    taps = low.new_tensor([0.25, 0.5, 0.25])
    kernel = (taps[:, None] * taps).expand(low.shape[1], 1, 3, 3)
    for level in range(levels):
        padded = F.pad(low, (2**level,) * 4, mode="replicate")
        low = F.conv2d(padded, kernel, dilation=2**level, groups=low.shape[1])
    return content + low


def focal_frequency_loss(
    pred: Tensor, target: Tensor, alpha: float = 1.0, log_matrix: bool = False
) -> Tensor:
    """Focal frequency loss (Jiang et al., ICCV 2021, Eq. 8-9): a spectral distance, hard bins weighted up.

    `pred` and `target` are images [B, C, H, W] of equal shape, any size and range; half types are computed in
    float32. The spectra are orthonormal 2-D FFTs of every image and channel. Returns the scalar mean over
    B, C, H, W of `w |F_pred - F_target|^2`; with `alpha` 0 this is the mean squared error (Parseval). Raises
    ValueError if the shapes differ.
    """
    if pred.shape != target.shape or pred.ndim != 4:
        raise ValueError(
            "expected two batches of images [B, C, H, W] of equal shape; "
            f"got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    if pred.dtype in (torch.float16, torch.bfloat16):
        pred, target = pred.float(), target.float()  # CPUs have no half FFT, GPUs only for some sizes
    # The transform is linear, so this is F_pred - F_target.
    spectrum = torch.view_as_real(torch.fft.fft2(pred - target, norm="ortho"))
    distance = spectrum.square().sum(dim=-1)  # [B, C, H, W]
    return (spectral_weights(distance, alpha, log_matrix) * distance).mean()


@torch.no_grad()
def spectral_weights(distance: Tensor, alpha: float, log_matrix: bool = False) -> Tensor:
    """Return weights `w = |F_pred - F_target|^alpha`, scaled to a maximum of 1 per image and channel (Eq. 8).

    `distance` is the squared modulus [B, C, H, W]. With `log_matrix` set, log(1 + w) is scaled. The weights
    are in [0, 1], have no gradient, and are 0 if the two images are equal.
    """
    weights = distance.sqrt().pow(alpha)
    if log_matrix:
        weights = weights.log1p()
    peak = weights.amax(dim=(-2, -1), keepdim=True)
    return weights / peak.clamp_min(torch.finfo(weights.dtype).tiny)
