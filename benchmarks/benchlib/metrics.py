"""Measures of a super-resolved image against the original, on luma, as the papers of the field take them.

Images are uint8 [H, W, 3]; planes are float64 luma [H, W] in 16..235.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage, stats
from skimage.metrics import structural_similarity

PEAK = 255.0
GMS_STABILISER = 170.0  # Xue et al. 2014, for luma in 0..255

COLUMNS = {
    "psnr": "PSNR↑",
    "ssim": "SSIM↑",
    "spectrum": "Spectrum ρ↑",
    "high_spectrum": "HF ρ↑",
    "gms": "GMS↑",
}
"""Headings of what `scores` returns; the arrow says which way is better."""

SHARPNESS = "sharpness"


def scores(sr: np.ndarray, hr: np.ndarray, scale: int) -> dict[str, float]:
    """All measures of COLUMNS for uint8 [H, W, 3] images of one size, without a border of `scale` pixels.

    Raises ValueError where the sizes differ or nothing is left to measure.
    """
    if sr.shape != hr.shape or min(hr.shape[:2]) < 2 * scale + 11:  # 11: the window of SSIM
        raise ValueError(
            f"got images of shape {sr.shape} and {hr.shape}; expected equal sizes of at least "
            f"{2 * scale + 11} pixels a side"
        )
    y_sr, y_hr = (measured_luma(image, scale) for image in (sr, hr))
    return {
        "psnr": psnr(y_sr, y_hr),
        "ssim": ssim(y_sr, y_hr),
        "spectrum": spectrum_correlation(y_sr, y_hr),
        "high_spectrum": spectrum_correlation(y_sr, y_hr, above=0.5 / scale),
        "gms": gradient_similarity(y_sr, y_hr),
    }


def sharpness(sr: np.ndarray, hr: np.ndarray, scale: int) -> float:
    """Mean gradient magnitude of luma as a share of the original's: 1 is as sharp, less is softer.

    uint8 [H, W, 3] both, without a border of `scale` pixels.
    """
    planes = (measured_luma(image, scale) for image in (sr, hr))
    a, b = (np.hypot(np.diff(y, axis=0)[:, 1:], np.diff(y, axis=1)[1:]).mean() for y in planes)
    return float(a / b)


def measured_luma(image: np.ndarray, scale: int) -> np.ndarray:
    """The plane that is measured: luma without a border of `scale` pixels."""
    return luma(image)[scale:-scale, scale:-scale]


def luma(image: np.ndarray) -> np.ndarray:
    """Uint8 RGB [H, W, 3] -> Y of BT.601 in studio range (16..235) as MATLAB's rgb2ycbcr, not rounded."""
    return 16.0 + image.astype(np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255.0)


def psnr(y_sr: np.ndarray, y_hr: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, for a peak of 255; infinite for equal planes."""
    mse = float(np.mean((y_sr - y_hr) ** 2))
    return float("inf") if mse == 0.0 else 10.0 * float(np.log10(PEAK**2 / mse))


def ssim(y_sr: np.ndarray, y_hr: np.ndarray) -> float:
    """Structural similarity of Wang et al. 2004: Gaussian window of 11 x 11 with sigma 1.5."""
    value: Any = structural_similarity(
        y_sr, y_hr, data_range=PEAK, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(value)


def log_spectrum(plane: np.ndarray) -> np.ndarray:
    """Log amplitude [H, W] of the plane's spectrum, zero frequency in the centre (paper Fig. 10)."""
    return np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(plane))))


def spectrum_correlation(y_sr: np.ndarray, y_hr: np.ndarray, above: float = 0.0) -> float:
    """Spearman's correlation of the two log-amplitude spectra (paper Fig. 10), -1 to 1.

    `above` keeps the bins beyond that radius in cycles a pixel; 0.5 / scale is the Nyquist frequency of the
    LR grid, so what is left is detail that the LR image does not hold.
    """
    height, width = y_hr.shape
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    kept = radius >= above  # the right half of the plane: a real image's spectrum is symmetric
    # Spearman's correlation is Pearson's of the ranks, and the logarithm does not change a rank.
    ranks_sr, ranks_hr = (stats.rankdata(np.abs(np.fft.rfft2(plane))[kept]) for plane in (y_sr, y_hr))
    return float(np.corrcoef(ranks_sr, ranks_hr)[0, 1])


def gradient_similarity(y_sr: np.ndarray, y_hr: np.ndarray) -> float:
    """Mean gradient magnitude similarity (Xue et al. 2014, Eq. 4-5), 0 to 1: Prewitt, at half size."""
    m_sr, m_hr = (_gradient_magnitude(plane) for plane in (y_sr, y_hr))
    similarity = (2 * m_sr * m_hr + GMS_STABILISER) / (m_sr**2 + m_hr**2 + GMS_STABILISER)
    return float(similarity.mean())


def _gradient_magnitude(plane: np.ndarray) -> np.ndarray:
    height, width = (side // 2 * 2 for side in plane.shape)
    half = plane[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
    # SciPy's Prewitt kernel sums three differences; the paper's averages them.
    return np.hypot(ndimage.prewitt(half, axis=0), ndimage.prewitt(half, axis=1)) / 3.0
