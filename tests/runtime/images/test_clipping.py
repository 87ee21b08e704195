"""Clipped white and black under every color correction: they have no influence and are not changed."""

from __future__ import annotations

import numpy as np
import pytest

from moesr.runtime.images import clipping
from moesr.runtime.images.color import adain, fix_color, wavelet

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


@pytest.mark.parametrize("method", FIXES)
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


def test_cells_of_clipped_pixels():
    plane = np.zeros((30, 41), np.float32)
    assert clipping.clipped_cells(plane) is None
    plane[8:20, 4:16] = 1.0
    plane[0:4, 20:24] = 1.0  # the region is too small
    cells = clipping.clipped_cells(plane)
    assert cells is not None and cells.shape == (8, 11)
    assert np.argwhere(cells).min(0).tolist() == [2, 1] and np.argwhere(cells).max(0).tolist() == [4, 3]
    plane[9, 9] = 0.9
    assert clipping.clipped_cells(plane) is None
