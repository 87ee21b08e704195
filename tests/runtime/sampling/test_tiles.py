"""Tile grids, blending weights and padding."""

from __future__ import annotations

import numpy as np
import pytest

from moesr.runtime.images.resize import reflect_pad
from moesr.runtime.sampling.tiles import (
    feather_weights,
    gaussian_weights,
    grid,
    runs,
    shifted_origins,
    tile_origins,
    weight_sum,
    wrapped_origins,
)


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


PHASES = [k * 49471 % 65536 / 65536 for k in range(50)]


@pytest.mark.parametrize(("tile", "overlap", "room"), [(76, 4, 9), (16, 1, 2), (7, 0, 1), (64, 8, 8)])
def test_shifted_origins_cover_and_move(tile, overlap, room):
    for size in range(tile, 4 * tile, 3):
        grids = [shifted_origins(size, tile, overlap, room, phase) for phase in PHASES]
        assert len(set(map(len, grids))) == 1
        for origins in grids:
            assert origins[0] == 0 and origins[-1] == size - tile
            assert (np.diff(origins) >= 0).all() and (np.diff(origins) <= tile - overlap).all()
        inner = np.array(grids)[:, 1:-1]
        reach = min(room, size - tile) * 0.9 - 1
        assert inner.size == 0 or (np.ptp(inner, axis=0) >= reach).all()


def test_a_shifted_grid_needs_fewer_tiles():
    assert len(tile_origins(256, 76, 19)) == 5 and len(shifted_origins(256, 76, 4, 9, 0.5)) == 4
    assert len(tile_origins(2500, 76, 19)) == 44 and len(shifted_origins(2500, 76, 4, 9, 0.5)) == 35
    assert shifted_origins(76, 76, 4, 9, 0.7) == [0]
    with pytest.raises(ValueError, match="pad it first"):
        shifted_origins(75, 76, 4, 9, 0.0)


@pytest.mark.parametrize("size", [1, 5, 16, 17, 40, 100])
def test_tiles_on_a_circle_cover_it_evenly(size):
    for phase in PHASES[:9]:
        origins = wrapped_origins(size, 16, 4, phase)
        gaps = np.diff([*origins, origins[0] + size])
        assert len(set(origins)) == len(origins) and origins[0] >= 0 and origins[-1] < size
        assert gaps.max() <= 12 or len(origins) == 1
        assert gaps.max() - gaps.min() <= 1
    with pytest.raises(ValueError, match="overlap"):
        wrapped_origins(40, 16, 16)


@pytest.mark.parametrize(("start", "length", "size"), [(0, 4, 9), (7, 4, 9), (3, 20, 6), (5, 1, 6)])
def test_runs_on_a_circle(start, length, size):
    circle, tile = np.arange(size), np.empty(length, int)
    for there, here in runs(start, length, size):
        tile[here] = circle[there]
    np.testing.assert_array_equal(tile, (start + np.arange(length)) % size)


def test_weights_on_a_circle_sum_to_those_of_all_tiles():
    weights = gaussian_weights(16)
    total = weight_sum(10, 40, [(0, 0), (0, 30), (5, 14)], weights, wraps=True)
    assert total.min() > 0 and total.sum() == pytest.approx(3 * weights.sum(), rel=1e-5)
    np.testing.assert_allclose(
        np.roll(total, 7, 1), weight_sum(10, 40, [(0, 7), (0, 37), (5, 21)], weights, wraps=True), rtol=1e-5
    )
    with pytest.raises(ValueError, match="leaves the canvas"):
        weight_sum(40, 40, [(30, 0)], weights)
