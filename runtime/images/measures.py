"""Measures of an image against its original: PSNR, SSIM, and the correlation of their spectra.

They are computed on luma, as is usual in the field's papers: Y of BT.601 in studio range, 16 to 235.
"""

from __future__ import annotations

import numpy as np

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # of SSIM
K1, K2 = 0.01, 0.03


def luma(image: np.ndarray) -> np.ndarray:
    """Return luma [H, W] of an image [H, W, 3] with values of 0 to 255, as MATLAB's rgb2ycbcr."""
    return 16.0 + image.astype(np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255.0)


def psnr(plane: np.ndarray, original: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB, for a peak of 255; infinite for equal planes."""
    error = float(np.mean((plane - original) ** 2))
    return float("inf") if error == 0.0 else 10.0 * float(np.log10(PEAK**2 / error))


def ssim(plane: np.ndarray, original: np.ndarray) -> float:
    """Return the structural similarity of Wang et al. (2004): a Gaussian window of 11 x 11 with sigma 1.5.

    Both sides must be at least 11 pixels. Windows that reach beyond the plane are left out.
    """
    mean_a, mean_b = _smooth(plane), _smooth(original)
    var_a = _smooth(plane * plane) - mean_a**2
    var_b = _smooth(original * original) - mean_b**2
    covariance = _smooth(plane * original) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((similar / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _smooth(plane: np.ndarray) -> np.ndarray:
    """Return the means under the Gaussian window at all places where it fits."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        size = plane.shape[axis] - WINDOW + 1
        rows = (np.take(plane, np.arange(size) + k, axis) * weight for k, weight in enumerate(weights))
        plane = sum(rows, np.zeros(1))
    return plane


def log_spectrum(plane: np.ndarray) -> np.ndarray:
    """Return the log amplitude [H, W] of a plane's spectrum with the zero frequency in the center."""
    return np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(plane))))


def spectrum_correlation(plane: np.ndarray, original: np.ndarray, above: float = 0.0) -> float:
    """Return Spearman's correlation of the amplitude spectra, -1 to 1 (MoE-SR, appendix C.2 and Fig. 10).

    A logarithm would not change it, as it depends on ranks alone. One half of the symmetric spectrum is used,
    and of it the frequencies of at least `above` cycles per pixel. With 0.5 / scale, the Nyquist frequency of
    the LR image, these are the frequencies that the LR image does not contain.
    """
    height, width = original.shape
    kept = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) >= above
    ranks = [_ranks(np.abs(np.fft.rfft2(each))[kept]) for each in (plane, original)]
    deviations = [rank - rank.mean() for rank in ranks]
    norm = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum() / norm) if norm else 1.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of values; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]
