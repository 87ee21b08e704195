"""Tile grids, blending weights and padding."""

from __future__ import annotations

import numpy as np
import pytest

from moesr.runtime.images.resize import reflect_pad
from moesr.runtime.sampling.tiles import feather_weights, gaussian_weights, grid, tile_origins


@pytest.mark.parametrize(("tile", "overlap"), [(128, 32), (128, 0), (7, 3), (5, 4), (1, 0)])
def test_origins_cover_evenly_with_enough_overlap(tile, overlap):
    for size in range(tile, 4 * tile + 40):
        origins = np.array(tile_origins(size, tile, overlap))
        assert origins[0] == 0 and origins[-1] == size - tile
        strides = np.diff(origins)
        assert (strides > 0).all() and (strides <= tile - overlap).all()
        assert len(strides) == 0 or strides.max() - strides.min() <= 1
        # One tile fewer could not cover the canvas.
        assert (len(origins) - 1) * (tile - overlap) < size - tile + (tile - overlap)


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "want"),
    [(128, 128, 32, [0]), (129, 128, 32, [0, 1]), (224, 128, 32, [0, 96]), (225, 128, 32, [0, 48, 97])],
)
def test_origins_by_hand(size, tile, overlap, want):
    assert tile_origins(size, tile, overlap) == want


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "message"),
    [(127, 128, 32, "pad it first"), (128, 128, 128, "overlap"), (128, 128, -1, "overlap")],
    ids=["small", "too much", "negative"],
)
def test_impossible_tilings_are_refused(size, tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        tile_origins(size, tile, overlap)


def test_grid_goes_row_by_row():
    assert grid(6, 9, 4, 1) == [(0, 0), (0, 2), (0, 5), (2, 0), (2, 2), (2, 5)]


@pytest.mark.parametrize("tile", [1, 2, 63, 64, 128, 512])
def test_gaussian_weights_are_positive_symmetric_and_peak_at_one(tile):
    weights = gaussian_weights(tile)
    assert weights.shape == (tile, tile) and weights.dtype == np.float32
    assert weights.min() > 0 and weights.max() == 1
    np.testing.assert_array_equal(weights, weights.T)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], rtol=1e-6)
    if tile == 512:  # one standard deviation is a tenth of the tile: 51.2 px either side of the middle
        middle = weights[tile // 2]
        assert middle[256 + 51] == pytest.approx(np.exp(-0.5), abs=0.01)


def test_feather_weights_of_neighbours_sum_to_one():
    tile, overlap = 64, 16
    profile = feather_weights(tile, overlap)[tile // 2]
    np.testing.assert_allclose(profile[-overlap:] + profile[:overlap], 1.0, atol=1e-6)
    assert (profile[overlap:-overlap] == 1).all() and profile.min() > 0
    assert (np.diff(profile[:overlap]) > 0).all()


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 7), (9, 5)])
def test_feather_weights_for_any_overlap(tile, overlap):
    weights = feather_weights(tile, overlap)
    assert weights.min() > 0 and weights.max() <= 1
    with pytest.raises(ValueError, match="overlap"):
        feather_weights(tile, tile)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 40), (37, 16)], ids=str)
def test_padding_reflects_as_often_as_needed(size):
    image = np.random.default_rng(3).integers(0, 256, (3, *size), np.uint8)
    padded, (height, width) = reflect_pad(image, 33, 34)
    assert padded.shape == (3, max(33, size[0]), max(34, size[1])) and padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[:, :height, :width], image)

    def walk(n: int, steps: int) -> list[int]:
        there_and_back = [*range(n), *range(n - 2, 0, -1)]
        return [there_and_back[i % len(there_and_back)] for i in range(steps)]

    rows, columns = walk(size[0], padded.shape[1]), walk(size[1], padded.shape[2])
    np.testing.assert_array_equal(padded, image[:, rows][:, :, columns])


def test_padding_takes_channels_last_and_leaves_large_images():
    image = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    padded, size = reflect_pad(image, 5, 6, axes=(0, 1))
    assert size == (2, 4) and padded.shape == (5, 6, 3)
    np.testing.assert_array_equal(padded.transpose(2, 0, 1), reflect_pad(image.transpose(2, 0, 1), 5, 6)[0])
    assert reflect_pad(image, 2, 3, axes=(0, 1))[0] is image
    with pytest.raises(ValueError, match="empty image"):
        reflect_pad(np.zeros((3, 0, 4), np.float32), 8, 8)
