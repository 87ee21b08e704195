"""Measures of a super-resolved image against the original, on luma as is usual in the field's papers.

Images are uint8 [H, W, 3]; planes are float64 luma [H, W] in 16..235.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage
from skimage.metrics import structural_similarity

from moesr.runtime.images.measures import PEAK, luma, psnr, spectrum_correlation

GMS_STABILISER = 170.0  # Xue et al. 2014, for luma in 0..255

COLUMNS = {
    "psnr": "PSNR↑",
    "ssim": "SSIM↑",
    "spectrum": "Spectrum ρ↑",
    "high_spectrum": "HF ρ↑",
    "gms": "GMS↑",
    "high_power": "HF power",
}
"""Headings of what `scores` returns; the arrow says which way is better."""

DIFFUSION = {"seeds": "two seeds, dB↓", "latent_share": "latent's share↑"}
"""Headings of what `diffusion_scores` returns: PSNR between the results of two seeds, and the share of the
power above the LR image's Nyquist frequency that is lost with zeros in place of the latent."""

SHARPNESS = "sharpness"
NIQE = "niqe_basicsr"
EPSILON = 1e-9  # used as the power of a plane that has none


def scores(sr: np.ndarray, hr: np.ndarray, scale: int) -> dict[str, float]:
    """Compute the measures of COLUMNS for uint8 [H, W, 3] images, without a border of `scale` pixels.

    Raises ValueError if the sizes differ or nothing is left to measure.
    """
    if sr.shape != hr.shape or min(hr.shape[:2]) < 2 * scale + 11:  # 11: the window of SSIM
        raise ValueError(
            f"got images of shape {sr.shape} and {hr.shape}; expected equal sizes of at least "
            f"{2 * scale + 11} pixels per side"
        )
    y_sr, y_hr = (measured_luma(image, scale) for image in (sr, hr))
    return {
        "psnr": psnr(y_sr, y_hr),
        "ssim": ssim(y_sr, y_hr),
        "spectrum": spectrum_correlation(y_sr, y_hr),
        "high_spectrum": spectrum_correlation(y_sr, y_hr, above=0.5 / scale),
        "gms": gradient_similarity(y_sr, y_hr),
        "high_power": power_above(y_sr, 0.5 / scale) / max(power_above(y_hr, 0.5 / scale), EPSILON),
    }


def diffusion_scores(sr: np.ndarray, again: np.ndarray, blank: np.ndarray, scale: int) -> dict[str, float]:
    """Compute the measures of DIFFUSION for one result, uint8 [H, W, 3].

    `again` is the result with another seed, `blank` the result with zeros in place of the latent.
    """
    y_sr, y_again, y_blank = (measured_luma(image, scale) for image in (sr, again, blank))
    kept = power_above(y_blank, 0.5 / scale) / max(power_above(y_sr, 0.5 / scale), EPSILON)
    return {"seeds": psnr(y_sr, y_again), "latent_share": 1.0 - kept}


def power_above(plane: np.ndarray, cycles: float) -> float:
    """Return the power of the plane's spectrum at radii of at least `cycles` per pixel, with a Hann window.

    Without the window, the step between opposite borders would dominate the highest frequencies. The mean is
    subtracted first.
    """
    height, width = plane.shape
    window = np.hanning(height)[:, None] * np.hanning(width)[None]
    power = np.abs(np.fft.fft2((plane - plane.mean()) * window)) ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    return float(power[radius >= cycles].sum())


def sharpness(sr: np.ndarray, hr: np.ndarray, scale: int) -> float:
    """Return the ratio of the mean luma gradient magnitudes of `sr` and `hr`; below 1, `sr` is softer.

    Both images are uint8 [H, W, 3] and measured without a border of `scale` pixels.
    """
    planes = (measured_luma(image, scale) for image in (sr, hr))
    a, b = (np.hypot(np.diff(y, axis=0)[:, 1:], np.diff(y, axis=1)[1:]).mean() for y in planes)
    return float(a / b)


def measured_luma(image: np.ndarray, scale: int) -> np.ndarray:
    """Return the plane that is measured: luma without a border of `scale` pixels."""
    return luma(image)[scale:-scale, scale:-scale]


def ssim(y_sr: np.ndarray, y_hr: np.ndarray) -> float:
    """Return the structural similarity of Wang et al. 2004: Gaussian window of 11 x 11 with sigma 1.5."""
    value: Any = structural_similarity(
        y_sr, y_hr, data_range=PEAK, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(value)


def gradient_similarity(y_sr: np.ndarray, y_hr: np.ndarray) -> float:
    """Return the mean gradient magnitude similarity, 0 to 1, at half size (Xue et al. 2014, Eq. 4-5)."""
    m_sr, m_hr = (_gradient_magnitude(plane) for plane in (y_sr, y_hr))
    similarity = (2 * m_sr * m_hr + GMS_STABILISER) / (m_sr**2 + m_hr**2 + GMS_STABILISER)
    return float(similarity.mean())


def _gradient_magnitude(plane: np.ndarray) -> np.ndarray:
    height, width = (side // 2 * 2 for side in plane.shape)
    half = plane[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
    # SciPy's Prewitt kernel sums three differences; the paper's averages them.
    return np.hypot(ndimage.prewitt(half, axis=0), ndimage.prewitt(half, axis=1)) / 3.0
