"""Color correction compared with published results and with its own definition."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from moesr.runtime.images.color import COLOR_FIXES, adain, fix_color, wavelet


def images(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random(shape, np.float32), (0.3 + 0.5 * rng.random(shape, np.float32)).astype(np.float32)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_equals_the_published_result(golden, method):
    published = golden("colour_and_ffl")
    got = fix_color(published["content"], published["style"], method)
    assert got.dtype == np.float32
    np.testing.assert_allclose(*published.pair(method, got), atol=1e-6)


def test_adain_takes_the_statistics_of_the_style():
    content, style = images(2, 3, 130, 70)
    got = adain(content, style[..., :31, :20])
    axes = (-2, -1)
    np.testing.assert_allclose(got.mean(axes), style[..., :31, :20].mean(axes), atol=1e-5)
    # The 1e-5 in both variances has a small effect: the content's variance is 1/12, the style's 1/48.
    np.testing.assert_allclose(got.std(axes, ddof=1), style[..., :31, :20].std(axes, ddof=1), rtol=1e-3)


def test_adain_of_a_flat_or_single_pixel_image_is_the_mean_of_the_style():
    style = images(3, 8, 8)[1]
    for content in (np.full((3, 8, 8), 0.5, np.float32), np.full((3, 1, 1), 0.5, np.float32)):
        got = adain(content, style)
        np.testing.assert_allclose(
            got, np.broadcast_to(style.mean((1, 2), keepdims=True), got.shape), atol=1e-6
        )


@pytest.mark.parametrize("shape", [(3, 40, 57), (3, 5, 90), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("levels", [1, 3, 5])
def test_wavelet_equals_the_paper_band_by_band(shape, levels):
    content, style = images(*shape)
    kernel = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16

    def split(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = plane.astype(np.float64), np.zeros(plane.shape)
        for level in range(levels):
            padded = np.pad(low, 2**level, mode="edge")
            height, width = low.shape
            taps = [(i, j) for i in range(3) for j in range(3)]
            blurred = sum(
                kernel[i, j] * padded[i * 2**level :, j * 2**level :][:height, :width] for i, j in taps
            )
            high += low - blurred
            low = blurred
        return low, high

    want = np.stack([split(c)[1] + split(s)[0] for c, s in zip(content, style, strict=True)])
    np.testing.assert_allclose(wavelet(content, style, levels), want, atol=1e-6)


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_in_place_equals_out_of_place(method):
    content, style = images(3, 33, 21)
    before, kept = content.copy(), style.copy()
    want = fix_color(content, style, method)
    np.testing.assert_array_equal(content, before)
    other = np.full_like(content, np.nan)
    assert fix_color(content, style, method, out=other) is other
    assert fix_color(content, style, method, out=content) is content
    np.testing.assert_array_equal(other, want)
    np.testing.assert_array_equal(content, want)
    np.testing.assert_array_equal(style, kept)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_correction_to_itself_changes_nothing(method):
    content = images(3, 20, 30)[0]
    np.testing.assert_allclose(fix_color(content, content, method), content, atol=1e-6)


def test_none_returns_the_image_itself():
    content, style = images(3, 4, 4)
    assert fix_color(content, style, "none") is content


@pytest.mark.parametrize(("method", "channels"), [("adain", 1), ("wavelet", 2.1)])
def test_in_place_memory_is_limited_to_a_few_channels(method, channels):
    content, style = images(3, 600, 500)
    tracemalloc.start()
    fix_color(content, style, method, out=content)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < channels * content[0].nbytes


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"'hsv'; choose one of adain, wavelet, none"):
        fix_color(*images(3, 4, 4), "hsv")


@pytest.mark.parametrize(("method", "style_shape"), [("adain", (4, 8, 8)), ("wavelet", (3, 8, 9))])
def test_different_shapes_are_refused(method, style_shape):
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        fix_color(np.zeros((3, 8, 8), np.float32), np.zeros(style_shape, np.float32), method)
