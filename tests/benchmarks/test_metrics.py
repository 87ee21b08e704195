"""The quality measures match independent implementations of their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchlib import metrics
from scipy import ndimage, stats
from skimage import data

from moesr.runtime.images.measures import log_spectrum

SCALE = 4


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return data.chelsea()[60:188, 100:260]


@pytest.fixture(scope="module")
def plane(photo) -> np.ndarray:
    return metrics.luma(photo)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image, (sigma, sigma, 0)[: image.ndim])


@pytest.mark.parametrize(
    ("rgb", "y"),
    [
        ((0, 0, 0), 16),
        ((255, 255, 255), 235),
        ((255, 0, 0), 81.481),
        ((0, 255, 0), 144.553),
        ((0, 0, 255), 40.966),
    ],
    ids=["black", "white", "red", "green", "blue"],
)
def test_luma_follows_bt_601(rgb, y):
    assert metrics.luma(np.full((1, 1, 3), rgb, np.uint8)) == pytest.approx(y)


def test_psnr_follows_its_definition(plane):
    assert metrics.psnr(plane + 5, plane) == pytest.approx(20 * np.log10(255 / 5))
    assert metrics.psnr(plane, plane) == np.inf


def test_ssim_follows_the_published_formula(plane):
    other = blurred(plane, 1.0)

    def mean(x):  # 11 x 11 Gaussian window
        return ndimage.gaussian_filter(x, 1.5, radius=5)

    mu_x, mu_y = mean(plane), mean(other)
    var_x, var_y = mean(plane**2) - mu_x**2, mean(other**2) - mu_y**2
    cov = mean(plane * other) - mu_x * mu_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    assert metrics.ssim(other, plane) == pytest.approx(ssim[5:-5, 5:-5].mean(), abs=1e-9)


def test_spectrum_correlation_is_a_rank_correlation(plane):
    other = blurred(plane, 1.0)
    a, b = (np.log1p(np.abs(np.fft.rfft2(p))).ravel() for p in (other, plane))
    want: Any = stats.spearmanr(a, b)
    assert metrics.spectrum_correlation(other, plane) == pytest.approx(want.statistic, abs=1e-9)


def test_spectrum_correlation_above_the_lr_band(plane):
    height, width = plane.shape
    noise = np.random.default_rng(0).normal(0, 8, plane.shape)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    low, high = (np.fft.ifft2(np.fft.fft2(noise) * band).real for band in (radius < 0.125, radius >= 0.125))
    whole, above = ({"above": 0.0}, {"above": 0.5 / SCALE})
    assert metrics.spectrum_correlation(plane + low, plane, **above) == pytest.approx(1, abs=1e-9)
    assert metrics.spectrum_correlation(plane + low, plane, **whole) < 1 - 1e-5
    assert metrics.spectrum_correlation(plane + high, plane, **above) < 0.9


def test_mean_of_the_log_spectrum_is_in_the_center(plane):
    spectrum = log_spectrum(plane)
    centre = tuple(side // 2 for side in plane.shape)
    assert np.unravel_index(spectrum.argmax(), spectrum.shape) == centre
    assert spectrum[centre] == pytest.approx(np.log1p(plane.sum()))


def test_gradient_similarity_follows_the_published_formula():
    rng = np.random.default_rng(1)
    a, b = rng.uniform(16, 235, (2, 12, 16))

    def magnitude(plane):
        half = np.pad(
            (plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2]) / 4, 1, "symmetric"
        )
        out = np.empty((6, 8))
        for y, x in np.ndindex(out.shape):
            window = half[y : y + 3, x : x + 3]
            across, down = (window[:, 0] - window[:, 2]).sum() / 3, (window[0] - window[2]).sum() / 3
            out[y, x] = np.sqrt(across**2 + down**2)
        return out

    m_a, m_b = magnitude(a), magnitude(b)
    want = ((2 * m_a * m_b + 170) / (m_a**2 + m_b**2 + 170)).mean()
    assert metrics.gradient_similarity(a, b) == pytest.approx(want)


def test_equal_images_score_best(photo):
    got = metrics.scores(photo, photo, SCALE)
    assert got.keys() == metrics.COLUMNS.keys()
    assert got.pop("psnr") == np.inf
    assert list(got.values()) == pytest.approx([1.0] * 5)


@pytest.mark.parametrize("name", list(metrics.COLUMNS))
def test_more_blur_scores_worse(name, photo):
    got = [metrics.scores(blurred(photo, sigma), photo, SCALE)[name] for sigma in (0.5, 1.0, 2.0)]
    assert got == sorted(got, reverse=True)
    assert got[-1] < got[0]


def test_sharpness_is_relative_to_the_original(photo):
    assert metrics.sharpness(photo, photo, SCALE) == 1.0
    assert 0.1 < metrics.sharpness(blurred(photo, 2.0), photo, SCALE) < 0.7


def test_borders_are_ignored(photo):
    framed = photo.copy()
    framed[:SCALE], framed[-SCALE:], framed[:, :SCALE], framed[:, -SCALE:] = 0, 255, 0, 255
    assert metrics.scores(framed, photo, SCALE)["psnr"] == np.inf
    framed[SCALE, SCALE] ^= 255
    assert metrics.scores(framed, photo, SCALE)["psnr"] < 90


@pytest.mark.parametrize("sr_shape", [(128, 159, 3), (12, 160, 3)], ids=str)
def test_images_that_cannot_be_compared_are_refused(sr_shape, photo):
    sr = np.zeros(sr_shape, np.uint8)
    with pytest.raises(ValueError, match="equal sizes of at least 19 pixels"):
        metrics.scores(sr, photo if sr_shape[0] == 128 else sr, SCALE)


def test_power_above_counts_only_frequencies_that_the_lr_image_lacks():
    """The image has two waves; only one of them is above the LR image's Nyquist frequency."""
    x = np.arange(128)
    slow, fast = (np.cos(2 * np.pi * cycles * x)[None] * np.ones((96, 1)) for cycles in (0.0625, 0.25))
    power = metrics.power_above(slow + fast, 0.125)
    assert power == pytest.approx(metrics.power_above(fast, 0.125), rel=1e-3)
    assert metrics.power_above(slow + 0.5 * fast, 0.125) == pytest.approx(power / 4, rel=1e-3)
    assert metrics.power_above(100.0 + slow, 0.125) < 1e-4 * power


def test_power_above_ignores_the_borders():
    """A ramp has no high frequencies, although its two ends differ."""
    ramp = np.linspace(0.0, 200.0, 128)[None] * np.ones((96, 1))
    noise = np.random.default_rng(0).normal(size=ramp.shape)
    assert metrics.power_above(ramp, 0.125) < 0.01 * metrics.power_above(noise, 0.125)


def test_diffusion_scores_of_known_images(photo):
    """Without the latent none, half or all of the detail is left. Equal results have an infinite PSNR."""
    soft = blurred(photo.astype(float), 3.0).round().astype(np.uint8)
    same = metrics.diffusion_scores(photo, photo, photo, SCALE)
    assert same == {"seeds": np.inf, "latent_share": 0.0}
    got = metrics.diffusion_scores(photo, soft, soft, SCALE)
    assert got["latent_share"] > 0.9
    assert got["seeds"] == pytest.approx(metrics.scores(photo, soft, SCALE)["psnr"])
