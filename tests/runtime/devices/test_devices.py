"""The host device: gathering windows, blending tiles into a weighted mean, and steps of the sampler."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from tile_cases import CANVASES, WEIGHTS

from moesr.runtime.devices.host import HostDevice
from moesr.runtime.devices.interface import Slot
from moesr.runtime.engine.graph_spec import BATCH, TensorSpec
from moesr.runtime.sampling import noise
from moesr.runtime.sampling.samplers import Coefficients
from moesr.runtime.sampling.tiles import feather_weights, gaussian_weights, grid

RNG = np.random.default_rng(8)
Shape = tuple[int, int, int]


class Blend:
    """A weighted mean on the host, to which tiles are added one by one."""

    def __init__(
        self, shape: tuple[int, int, int], origins: list[tuple[int, int]], weights: np.ndarray
    ) -> None:
        self.device = HostDevice()
        self.mean = self.device.mean(shape, origins, weights)
        self._z = self.device.canvas(shape)

    def add(self, y: int, x: int, tile: np.ndarray) -> None:
        self.device.blend([Slot({}, {}, self.mean, y, x)], tile[None])

    def result(self) -> np.ndarray:
        return self.device.download(self.mean)

    def reset(self) -> None:
        self.device.advance(self._z, self.mean, Coefficients(*map(np.float32, (0, 0, 0))), 0, 0)


def test_gather_reads_windows_of_any_canvas():
    device = HostDevice()
    shape = (3, 5, 5)
    specs = [TensorSpec(n, "float32", (BATCH, *shape)) for n in ("z_t", "cond")]
    specs += [TensorSpec("image", "float32", (BATCH, 3, 10, 10)), TensorSpec("t", "float32", (BATCH,))]
    specs += [TensorSpec("fidelity", "float32", (1,))]
    buffers = {spec.name: device.buffer(spec, 3) for spec in specs}
    slots, wants = [], []
    target = device.mean((3, 5, 5), [(0, 0)], np.ones((5, 5), np.float32))
    for (height, width), dtype, (y, x) in [((9, 7), np.uint8, (4, 2)), ((5, 6), np.uint16, (0, 1))]:
        z, top = device.canvas((3, height, width)), np.iinfo(dtype).max
        device.gaussian(z, 1, 2)
        small = RNG.integers(0, top + 1, (height, width, 3), dtype)
        large = RNG.integers(0, top + 1, (2 * height, 2 * width, 3), dtype)
        sources = {"z_t": z, "cond": device.upload(small), "image": device.upload(large, 2)}
        slots.append(Slot(sources, {"t": 7.0 + y, "fidelity": 0.5}, target, y, x))
        cond, image = small[y : y + 5, x : x + 5], large[2 * y : 2 * y + 10, 2 * x : 2 * x + 10]
        wants.append((z.data[:, y : y + 5, x : x + 5], cond / (top / 2) - 1, image / (top / 2) - 1))
    device.gather(slots, buffers)
    for i, (z, cond, image) in enumerate(wants):
        np.testing.assert_array_equal(buffers["z_t"][i], z)
        np.testing.assert_allclose(buffers["cond"][i], cond.transpose(2, 0, 1), atol=1e-6)
        np.testing.assert_allclose(buffers["image"][i], image.transpose(2, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(buffers["t"], [11.0, 7.0, 0.0])
    np.testing.assert_array_equal(buffers["fidelity"], [0.5])


def test_step_adds_the_noise_of_its_number():
    device, shape = HostDevice(), (2, 6, 7)
    z, out = device.canvas(shape), device.mean(shape, [(0, 0), (0, 1)], np.ones((6, 6), np.float32))
    device.gaussian(z, 3, noise.INITIAL_NOISE)
    out.data[:] = RNG.standard_normal(shape)
    want = 0.5 * z.data + 0.25 * out.data + 0.125 * noise.gaussian(3, 4, shape)
    device.advance(z, out, Coefficients(*map(np.float32, (0.5, 0.25, 0.125))), 3, 4)
    np.testing.assert_allclose(z.data, want, rtol=1e-6, atol=1e-6)
    assert not out.data.any()
    other, history = device.canvas(shape), device.canvas(shape)
    device.gaussian(history, 3, 5)
    out.data[:] = RNG.standard_normal(shape)
    c, before, blended, kept = (
        (0.5, 0.25, 0.0, 0.1, 2.0, -3.0),
        z.data.copy(),
        out.data.copy(),
        history.data.copy(),
    )
    device.advance(z, out, Coefficients(*map(np.float32, c)), 3, 4, history)
    want = 0.5 * before + 0.25 * blended + 0.1 * kept
    np.testing.assert_allclose(z.data, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(history.data, 2 * before - 3 * blended, rtol=1e-6, atol=1e-6)
    device.gaussian(other, 3, 9)
    device.mix(z, other, 0.5, 1.5)
    np.testing.assert_allclose(z.data, 0.5 * want + 1.5 * other.data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_non_finite_values_raise_the_flag_of_their_canvas(poison: float):
    device, tile = HostDevice(), np.ones((1, 4, 4), np.float32)
    means = [device.mean((1, 4, 4), [(0, 0)], np.ones((4, 4), np.float32)) for _ in range(3)]
    output = np.stack([tile, tile, tile])
    output[1, 0, 2, 3] = poison
    device.blend([Slot({}, {}, mean, 0, 0) for mean in means], output)
    assert [device.finite(mean) for mean in means] == [True, False, True]


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("canvas", CANVASES, ids=str)
@pytest.mark.parametrize("overlap", [0, 32, 100])
def test_tiles_cut_from_one_image_blend_to_that_image(kind, canvas, overlap):
    tile = 128
    image = np.random.default_rng(0).standard_normal((3, *canvas)).astype(np.float32)
    origins = grid(*canvas, tile, overlap)
    blend = Blend(image.shape, origins, WEIGHTS[kind](tile))
    for _ in range(2):  # a second round must not depend on the first
        blend.reset()
        for y, x in reversed(origins):
            blend.add(y, x, image[:, y : y + tile, x : x + tile])
        np.testing.assert_allclose(blend.result(), image, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_8_bit_level_survives_blending_of_constant_tiles(kind):
    tile, canvas = 32, (45, 83)
    origins = grid(*canvas, tile, 20)
    levels = np.arange(256, dtype=np.float32) / 127.5 - 1
    blend = Blend((256, *canvas), origins, WEIGHTS[kind](tile))
    constant = np.broadcast_to(levels[:, None, None], (256, tile, tile))
    for y, x in origins:
        blend.add(y, x, constant)
    got = np.rint((blend.result() + 1) * 127.5)
    np.testing.assert_array_equal(got, np.broadcast_to(np.arange(256)[:, None, None], got.shape))


def test_border_and_single_tiles_are_kept_exactly():
    tile, canvas = 16, (16, 28)
    rng = np.random.default_rng(1)
    left, right = rng.random((2, 3, tile, tile), np.float32)
    blend = Blend((3, *canvas), [(0, 0), (0, 12)], feather_weights(tile, 4))
    blend.add(0, 0, left)
    blend.add(0, 12, right)
    np.testing.assert_array_equal(blend.result()[..., :12], left[..., :12])
    np.testing.assert_array_equal(blend.result()[..., 16:], right[..., 4:])


def test_blend_is_the_weighted_mean_of_disagreeing_tiles():
    tile = 8
    weights = np.random.default_rng(2).random((tile, tile), np.float32) + np.float32(0.1)
    origins = [(0, 0), (0, 3), (2, 0), (2, 3)]
    total, weight_sum = np.zeros((2, 10, 11)), np.zeros((10, 11))
    blend = Blend((2, 10, 11), origins, weights)
    for k, (y, x) in enumerate(origins):
        value = np.random.default_rng(10 + k).random((2, tile, tile), np.float32)
        blend.add(y, x, value)
        total[:, y : y + tile, x : x + tile] += weights * value
        weight_sum[y : y + tile, x : x + tile] += weights
    np.testing.assert_allclose(blend.result(), total / weight_sum, rtol=1e-5)


def test_seam_between_disagreeing_tiles_is_a_smooth_ramp():
    tile, overlap = 64, 32
    blend = Blend((1, 64, 96), [(0, 0), (0, 32)], feather_weights(tile, overlap))
    blend.add(0, 0, np.zeros((1, tile, tile), np.float32))
    blend.add(0, 32, np.ones((1, tile, tile), np.float32))
    row = blend.result()[0, 30]
    steps = np.diff(row)
    assert row[0] == 0 and row[-1] == 1
    assert steps.min() >= -1e-6
    assert steps.max() < 1.7 / overlap  # a raised cosine is steepest at pi/2 times the linear ramp


def test_adding_allocates_nothing():
    tile = 256
    blend = Blend((3, 300, 300), grid(300, 300, tile, 32), gaussian_weights(tile))
    data = np.ones((3, tile, tile), np.float32)
    blend.reset()
    tracemalloc.start()
    blend.reset()
    blend.add(44, 44, data)
    blend.result()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < data[0].nbytes / 2  # NumPy's iterator keeps a fixed buffer of 64 KiB


@pytest.mark.parametrize(
    ("origins", "message"),
    [([(0, 0)], "do not cover"), ([(0, 0), (0, 5)], "leaves the canvas"), ([], "do not cover")],
    ids=["gap", "outside", "none"],
)
def test_unsuitable_tilings_are_refused(origins, message):
    with pytest.raises(ValueError, match=message):
        Blend((3, 8, 12), origins, gaussian_weights(8))


def test_weights_must_be_square():
    with pytest.raises(ValueError, match="square"):
        Blend((3, 8, 8), [(0, 0)], np.ones((8, 4), np.float32))
