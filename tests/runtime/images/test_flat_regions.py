"""Flat regions under every color correction: they take no part in it and keep their level."""

from __future__ import annotations

import numpy as np
import pytest

from moesr.runtime.images import flat_regions
from moesr.runtime.images.color import COLOR_FIXES, adain, fix_color, wavelet

RNG = np.random.default_rng(3)
FIXES = ["adain", "wavelet"]


def page(height: int, width: int, paper: float) -> tuple[np.ndarray, np.ndarray]:
    """Return an enlarged page [1, H, W], with soft text on flat paper above, and a sharper result of it."""
    lr_up = np.full((1, height, width), paper, np.float32)
    text = RNG.random((height // 2, width), np.float32) * 1.2 - 0.6
    lr_up[0, : height // 2] = text
    sr = lr_up * np.float32(1.5 if abs(paper) < 1 else 1.0)
    sr[0, : height // 2] = text * 1.5 + 0.1
    return sr, lr_up


@pytest.mark.parametrize("method", COLOR_FIXES)
@pytest.mark.parametrize("paper", [1.0, -1.0, 1 - 2 / 255])
@pytest.mark.parametrize("size", [(160, 130), (157, 91)], ids=str)
def test_flat_white_and_black_stay(method: str, paper: float, size: tuple[int, int]):
    sr, lr_up = page(*size, paper)
    sr[0, size[0] // 2 :] += RNG.normal(0, 0.01, (size[0] - size[0] // 2, size[1])).astype(np.float32)
    got = fix_color(sr, lr_up, method)
    paper_rows = got[0, size[0] // 2 + 16 :]
    assert np.abs(paper_rows - paper).max() < 1 / 65535  # half a level of 16 bits


@pytest.mark.parametrize("method", FIXES)
def test_clipped_regions_have_no_influence(method: str):
    sr, lr_up = page(400, 120, 1.0)
    alone = fix_color(sr[:, :200], lr_up[:, :200], method)
    # Far from the paper the text is corrected as if there were no paper.
    np.testing.assert_allclose(fix_color(sr, lr_up, method)[:, :120], alone[:, :120], atol=1e-5)
    published = {"adain": adain, "wavelet": wavelet}[method](sr, lr_up)
    assert method == "wavelet" or np.abs(published[:, :120] - alone[:, :120]).max() > 0.05


@pytest.mark.parametrize("method", FIXES)
@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 33, 21), (1, 1, 1)], ids=str)
def test_completely_white_image_equals_the_input(method: str, shape: tuple[int, ...]):
    white = np.ones(shape, np.float32)
    np.testing.assert_array_equal(fix_color(white * np.float32(0.9), white, method), white)


@pytest.mark.parametrize("method", FIXES)
def test_without_clipped_regions_the_published_method_is_unchanged(method: str):
    lr_up = RNG.uniform(-1, 1, (3, 90, 70)).astype(np.float32)
    lr_up[:, 8:12, 8:12] = 1.0  # one clipped cell is a highlight, not a region
    sr = (lr_up * np.float32(0.8)).astype(np.float32)
    published = {"adain": adain, "wavelet": wavelet}[method](sr, lr_up)
    np.testing.assert_array_equal(fix_color(sr, lr_up, method), published)


@pytest.mark.parametrize("method", FIXES)
def test_in_place_equals_out_of_place(method: str):
    sr, lr_up = page(160, 130, -1.0)
    want = fix_color(sr, lr_up, method)
    assert fix_color(sr, lr_up, method, out=sr) is sr
    np.testing.assert_array_equal(sr, want)


LEVEL = 2 / 255


@pytest.mark.parametrize("method", FIXES)
@pytest.mark.parametrize("level", [250, 245, 240, 5, 12])
def test_flat_regions_close_to_white_or_black_are_the_input(method: str, level: int):
    paper = level * LEVEL - 1
    sr, lr_up = page(400, 200, paper)
    sr[0, 200:] += RNG.normal(0.03, 0.02, (200, 200)).astype(np.float32)
    got = fix_color(sr, lr_up, method)
    assert np.abs(got[0, 216:] - paper).max() < 1 / 65535
    assert np.abs(adain(sr, lr_up)[0, 216:] - paper).mean() > LEVEL


@pytest.mark.parametrize("level", [250, 230, 200, 128, 60, 20])
@pytest.mark.parametrize("spread", [0, 3])
def test_flat_regions_of_any_level_keep_their_mean(level: int, spread: int):
    """A scan is never quite even; close to white and black it may be noisy by some levels."""
    lr_up = np.full((1, 400, 200), level, np.float32)
    if 32 < level < 223:
        spread = 0
    lr_up[0] += np.kron(RNG.integers(-spread, spread + 1, (100, 50)), np.ones((4, 4)))
    lr_up[0, :200] = RNG.integers(0, 256, (200, 200))
    lr_up = lr_up * np.float32(LEVEL) - 1
    sr = (lr_up + RNG.normal(0.03, 0.02, lr_up.shape)).astype(np.float32)
    sr[0, :200] *= 1.4  # sharper than the enlarged input, so that the deviations differ
    want, got = lr_up[0, 216:], fix_color(sr, lr_up, "adain")[0, 216:]
    assert np.abs(got.mean() - want.mean()) < 0.2 * LEVEL
    assert np.abs(got - want).max() < 16 * LEVEL
    assert abs(level - 128) < 80 or np.abs(adain(sr, lr_up)[0, 216:].mean() - want.mean()) > LEVEL


def test_the_correction_does_not_change_abruptly_beside_a_flat_region():
    """A network that is off by a constant is corrected inside of the region, at its edge and far from it."""
    lr_up = np.clip(RNG.normal(0, 0.4, (1, 200, 120)), -0.8, 0.8).astype(np.float32)
    lr_up[0, 100:] = 1.0
    got = fix_color(lr_up - np.float32(0.1), lr_up, "adain")
    rows = (got - lr_up)[0].mean(axis=1)
    assert np.abs(rows).max() < 1.5 * LEVEL


def test_without_a_correction_all_but_white_and_black_is_left_alone():
    sr, lr_up = page(160, 130, 1.0)
    lr_up[0, 80:, :65] = 250 * LEVEL - 1
    got = fix_color(sr, lr_up, "none")
    assert got is not sr
    np.testing.assert_array_equal(got[0, :70], sr[0, :70])
    np.testing.assert_array_equal(got[0, :, :40], sr[0, :, :40])
    assert np.abs(got[0, 96:, 80:] - 1).max() == 0


def test_an_image_of_one_level_is_corrected_as_published():
    lr_up = np.full((1, 40, 40), 0.1, np.float32)
    sr = lr_up + RNG.normal(0.1, 0.05, lr_up.shape).astype(np.float32)
    np.testing.assert_allclose(fix_color(sr, lr_up, "adain"), adain(sr, lr_up), atol=1e-6)


def test_cells_of_flat_pixels():
    plane = np.tile(np.linspace(-0.5, 0.5, 41, dtype=np.float32), (30, 1))

    def found() -> list[flat_regions.Regions | None]:
        searches = flat_regions.Search(), flat_regions.Search()
        for start in range(0, 30, 12):
            for search in searches:
                search.add(plane[start : start + 12], plane[start : start + 12] - 0.25)
        return [searches[0].clipped(), searches[1].flat()]

    assert found() == [None, None]
    plane[8:20, 4:16] = 1.0
    plane[0:4, 20:24] = 1.0  # the region is too small
    for regions in found():
        assert regions is not None and regions.pinned.shape == (8, 11)
        np.testing.assert_allclose(regions.differences, 0.25, atol=1e-6)
        for cells in (regions.pinned, regions.near, regions.steady):
            assert np.argwhere(cells).min(0).tolist() == [2, 1]
            assert np.argwhere(cells).max(0).tolist() == [4, 3]
    plane[9, 9] = 0.6
    assert found() == [None, None]
