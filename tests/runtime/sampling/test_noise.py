"""The counter-based noise: its distribution, the independence of its elements, and pinned values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moesr.runtime.sampling.noise import INITIAL_NOISE, _fill, gaussian

SHAPE = (3, 200, 201)


def test_distribution_is_standard_normal():
    x = np.sort(gaussian(7, 0, (1, 600, 701)).astype(np.float64).ravel())
    n = x.size
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    cumulative = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x[::101]])
    distance = np.abs(cumulative - np.arange(0, n, 101) / n).max()
    assert distance < 2 / math.sqrt(n)  # Kolmogorov-Smirnov, p about 1e-3


@pytest.mark.parametrize("shift", [1, 2, 201], ids=["neighbour", "next pair", "next row"])
def test_elements_are_independent(shift):
    x = gaussian(11, 5, SHAPE).ravel()
    bound = 5 / math.sqrt(x.size)
    assert abs(np.mean(x[shift:] * x[:-shift])) < bound
    assert abs(np.mean((x[shift:] ** 2 - 1) * (x[:-shift] ** 2 - 1))) < 2 * bound


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, 0), (0, 1)),
        ((0, INITIAL_NOISE), (0, 0)),
        ((0, 0), (1, 0)),
        ((3, 4), (4, 3)),
        ((0, 5), (2**63, 5)),
    ],
    ids=["steps", "initial", "seeds", "swapped", "far seeds"],
)
def test_steps_and_seeds_are_independent(one, other):
    a, b = gaussian(*one, SHAPE), gaussian(*other, SHAPE)
    assert abs(np.mean(a * b)) < 5 / math.sqrt(a.size)
    assert not np.any(a.ravel()[:100] == b.ravel()[:100])


@pytest.mark.parametrize(
    ("seed", "step", "first"),
    [
        (0, INITIAL_NOISE, [2.91620326, 0.646885276, -1.28554034, -1.0902983, -1.39015722, 1.56724429]),
        (0, 0, [0.634954095, -0.100054078, -0.221799448, 0.722925901, 0.81134671, 0.371153831]),
        (42, 49, [0.556566834, -0.833859086, 1.15733933, 0.477371216, 1.44193685, -0.852029145]),
        (2**64 - 1, 3, [1.81406617, -1.05835629, 1.34986138, -0.480328381, -0.0804108083, -0.0480407178]),
    ],
)
def test_values_are_pinned(seed, step, first):
    # The logarithm, sine and cosine of the platform may differ by one unit in the last place.
    np.testing.assert_allclose(gaussian(seed, step, (1, 2, 3)).ravel(), first, rtol=3e-7)


def test_repeatable_and_independent_of_the_block_size(monkeypatch):
    whole = gaussian(5, 9, SHAPE)
    np.testing.assert_array_equal(gaussian(5, 9, SHAPE), whole)
    monkeypatch.setattr("moesr.runtime.sampling.noise.BLOCK", 2000)
    np.testing.assert_array_equal(gaussian(5, 9, SHAPE), whole)


def test_extreme_words_give_finite_values():
    block = np.empty(4, np.float32)
    _fill(block, np.array([0, 2**64 - 1], np.uint64))
    assert block[0] == pytest.approx(math.sqrt(2 * 33 * math.log(2)))  # the smallest uniform is 2**-33
    assert np.isfinite(block).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 2, 2)], ids=str)
def test_arrays_of_any_shape_are_filled(shape):
    out = np.full(shape, np.nan, np.float32)
    assert gaussian(1, 2, shape, out=out) is out
    np.testing.assert_array_equal(out, gaussian(1, 2, shape))
    assert np.isfinite(out).all()


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**64, 0), (0, -2), (0, 2**64 - 1)])
def test_key_out_of_range_is_refused(seed, step):
    with pytest.raises(ValueError, match="must be"):
        gaussian(seed, step, (1, 1, 1))


@pytest.mark.parametrize(
    "out",
    [
        np.empty((1, 2, 2), np.float64),
        np.empty((1, 2, 3), np.float32),
        np.empty((1, 2, 4), np.float32)[..., ::2],
    ],
    ids=["dtype", "shape", "strided"],
)
def test_unsuitable_out_is_refused(out):
    with pytest.raises(ValueError, match="C-contiguous float32"):
        gaussian(0, 0, (1, 2, 2), out=out)
