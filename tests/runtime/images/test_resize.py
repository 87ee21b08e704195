"""MATLAB's bicubic resize compared with published results, Pillow's kernel, and a plain double loop."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from moesr.runtime.images.resize import imresize


@pytest.mark.parametrize(
    ("source", "target", "scale"),
    [("small", "up2", 2), ("small", "up8", 8), ("large", "down8", 1 / 8), ("large", "down4", 1 / 4)],
    ids=["up2", "up8", "down8", "down4"],
)
def test_uint8_equals_the_published_results(golden, source, target, scale):
    published = golden("imresize")
    image = published[source]
    got = imresize(image, *(round(scale * side) for side in image.shape[:2]))
    np.testing.assert_array_equal(*published.pair(target, got))


@pytest.mark.parametrize("size", [(120, 160), (73, 41), (20, 30), (97, 15), (11, 90)], ids=str)
def test_interior_equals_pillow(size):
    image = np.random.default_rng(0).random((40, 60)).astype(np.float32)
    want = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    # Only the edges are treated differently: leave out pixels for which the kernel reaches beyond them.
    margin = [math.ceil(2 * max(out / n, 1.0)) + 1 for out, n in zip(size, image.shape, strict=True)]
    inside = tuple(slice(m, n - m) for m, n in zip(margin, size, strict=True))
    np.testing.assert_allclose(imresize(image, *size)[inside], want[inside], atol=2e-6)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("size", "out_size"), [(7, 16), (16, 7), (5, 5), (1, 6), (6, 1), (2, 9)])
def test_one_axis_equals_the_definition(size, out_size, antialias):
    image = np.random.default_rng(1).random(size).astype(np.float32)
    scale = out_size / size
    stretch = min(scale, 1.0) if antialias else 1.0

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    def mirrored(i: int) -> float:
        i %= 2 * size
        return float(image[i if i < size else 2 * size - 1 - i])

    want = []
    for u in range(out_size):
        centre = (u + 0.5) / scale - 0.5
        reach = math.ceil(2 / stretch) + 1
        taps = range(math.floor(centre) - reach, math.floor(centre) + reach + 1)
        weights = [kernel(stretch * (centre - i)) for i in taps]
        want.append(sum(w * mirrored(i) for w, i in zip(weights, taps, strict=True)) / sum(weights))
    np.testing.assert_allclose(
        imresize(image[:, None], out_size, 1, antialias=antialias)[:, 0], want, atol=1e-6
    )
    np.testing.assert_allclose(imresize(image[None], 1, out_size, antialias=antialias)[0], want, atol=1e-6)


def test_antialiasing_affects_reductions_only():
    image = np.random.default_rng(2).integers(0, 256, (24, 24, 3), np.uint8)
    assert (imresize(image, 6, 6) != imresize(image, 6, 6, antialias=False)).any()
    np.testing.assert_array_equal(imresize(image, 48, 48), imresize(image, 48, 48, antialias=False))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (1, 9, 4), (5, 1, 1), (3, 50)], ids=str)
@pytest.mark.parametrize("size", [(4, 4), (1, 1), (2, 37)], ids=str)
def test_all_sources_keep_type_axes_and_constants(dtype, shape, size):
    value = 0.7 if dtype == np.float32 else np.iinfo(dtype).max
    out = imresize(np.full(shape, value, dtype), *size)
    assert out.shape == (*size, *shape[2:]) and out.dtype == dtype
    np.testing.assert_allclose(out, np.full_like(out, value), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_integers_are_clipped_if_floats_overshoot(dtype):
    top = np.iinfo(dtype).max
    step = np.repeat(np.array([[0, top]], dtype), 8, axis=1)
    out, real = imresize(step, 1, 64), imresize(step.astype(np.float32), 1, 64)
    assert real.min() < 0 and real.max() > top
    np.testing.assert_array_equal(out, np.clip(np.rint(real.astype(np.float64)), 0, top))


def test_same_size_is_the_identity():
    image = np.random.default_rng(3).integers(0, 65536, (13, 17, 3), np.uint16)
    np.testing.assert_array_equal(imresize(image, 13, 17), image)


@pytest.mark.parametrize("size", [(90, 70), (9, 70), (90, 7), (9, 7)], ids=str)
@pytest.mark.parametrize("block_bytes", [1, 5000])
def test_result_does_not_depend_on_blocks(monkeypatch, size, block_bytes):
    image = np.random.default_rng(4).integers(0, 256, (31, 29, 3), np.uint8)
    whole = imresize(image, *size)
    monkeypatch.setattr("moesr.runtime.images.resize._BLOCK_BYTES", block_bytes)
    np.testing.assert_array_equal(imresize(image, *size), whole)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((400, 400, 3), (1600, 1600)), ((4000, 400, 3), (1000, 100)), ((4000, 400, 3), (400, 39))],
    ids=["enlarge", "reduce", "reduce columns first"],
)
def test_memory_is_bounded_by_blocks(monkeypatch, shape, size):
    block_bytes = 1 << 20
    monkeypatch.setattr("moesr.runtime.images.resize._BLOCK_BYTES", block_bytes)
    image = np.zeros(shape, np.float32)
    tracemalloc.start()
    out = imresize(image, *size)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < out.nbytes + 5 * block_bytes


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (np.zeros((4, 4)), (8, 8), "float64"),
        (np.zeros((1, 3, 4, 4), np.uint8), (8, 8), "HxWxC"),
        (np.zeros((0, 4), np.uint8), (8, 8), "sizes start at 1"),
        (np.zeros((4, 4), np.uint8), (0, 8), "to 0x8"),
    ],
    ids=["dtype", "axes", "empty source", "empty target"],
)
def test_bad_input_is_refused(image, size, message):
    with pytest.raises(ValueError, match=message):
        imresize(image, *size)
