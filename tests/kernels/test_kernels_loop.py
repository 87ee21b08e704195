"""The kernels of the sampling loop equal the host to the last bit, whichever tiles share a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from moesr.kernels.sampler_step.kernel import normals
from moesr.kernels.sampler_step.operator import sampler_step
from moesr.kernels.tile_blend.operator import tile_blend
from moesr.kernels.tile_gather.operator import tile_gather
from moesr.runtime.devices.host import HostDevice
from moesr.runtime.devices.interface import Slot
from moesr.runtime.images.planes import to_unit
from moesr.runtime.sampling import noise, samplers, tiles

SIZES = [(3, 29, 24), (3, 12, 37)]
TILE = 12
KEYS = [(0, noise.INITIAL_NOISE), (0, 0), (42, 49), (2**63 - 1, 999), (2**63 - 1, 2**40)]


def advanced(z: np.ndarray, sums: np.ndarray, coefficients: list[float], seed: int, step: int) -> np.ndarray:
    """Return the result of one sampler step on the host."""
    c = samplers.Coefficients(*map(np.float32, coefficients))
    z = z.copy()
    samplers.advance(z, sums, noise.gaussian(seed, step, z.shape), c, np.empty_like(z))
    return z


@pytest.mark.parametrize(("seed", "step"), KEYS)
def test_noise_equals_the_host(seed, step):
    z, sums = torch.zeros(3, 31, 33), torch.full((3, 31, 33), 0.0)
    sampler_step(z, sums, torch.tensor([0.0, 0.0, 1.0]), seed, step)
    want = noise.gaussian(seed, step, (3, 31, 33))
    # Both round a float64 result once; log, cos and sin of a platform may differ in the last float64 place.
    np.testing.assert_array_max_ulp(z.numpy(), want, maxulp=1)
    assert (z.numpy() == want).mean() > 0.999


@triton.jit
def normals_of_words(words, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    cosine, sine = normals(tl.load(words + index).to(tl.uint64, bitcast=True))
    tl.store(out + 2 * index, cosine)
    tl.store(out + 2 * index + 1, sine)


def test_normals_of_extreme_words():
    """The words give the smallest and largest radii, and angles close to each multiple of pi / 4."""
    near = np.arange(-2, 3)
    low = (np.arange(9)[:, None] * 2**29 + near).ravel() % 2**32
    high = np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1, 3037000499, 3037000500])  # 2^32 sqrt(1/2)
    words = (high[:, None].astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)).ravel()
    words = np.resize(words, 512)
    got, want = np.full(1024, np.nan, np.float32), np.empty(1024, np.float32)
    noise._fill(want, words)
    out = torch.from_numpy(got)
    normals_of_words[(1,)](torch.from_numpy(words.view(np.int64)), out, SIZE=512)
    np.testing.assert_array_max_ulp(got, want, maxulp=1)
    assert (got == want).mean() > 0.99


@pytest.mark.parametrize("size", [*SIZES, (4, 61, 67)], ids=str)
@pytest.mark.parametrize("c_noise", [0.0, 0.25])
def test_step_equals_the_host(size, c_noise):
    z, sums = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    want = advanced(z.numpy(), sums.numpy(), [1.0123, -0.3, c_noise], 7, 3)
    sampler_step(z, sums, torch.tensor([1.0123, -0.3, c_noise]), 7, 3)
    np.testing.assert_array_max_ulp(z.numpy(), want, maxulp=0 if c_noise == 0 else 1)
    assert not sums.any()


@pytest.mark.parametrize("c_noise", [0.0, 0.25])
def test_step_with_a_history_equals_the_host(c_noise):
    z, sums, history = torch.randn(3, 3, 29, 24, generator=torch.Generator().manual_seed(1))
    values = [1.0123, -0.3, c_noise, -0.45, 1.7, -1.2]
    want, kept = z.numpy().copy(), history.numpy().copy()
    c = samplers.Coefficients(*map(np.float32, values))
    drawn = noise.gaussian(7, 3, want.shape)
    samplers.advance(want, sums.numpy(), drawn, c, np.empty_like(want), kept)
    sampler_step(z, sums, torch.tensor(values), 7, 3, history)
    np.testing.assert_array_max_ulp(z.numpy(), want, maxulp=0 if c_noise == 0 else 1)
    np.testing.assert_array_equal(history.numpy(), kept)
    assert not sums.any()


def test_step_without_noise_ignores_the_seed():
    z, sums = torch.randn(2, 3, 9, 9)
    other, same = z.clone(), sums.clone()
    sampler_step(z, sums, torch.tensor([0.9, 0.1, 0.0]), 1, 0)
    sampler_step(other, same, torch.tensor([0.9, 0.1, 0.0]), 2, 5)
    assert torch.equal(z, other)


class Canvases:
    """Two canvases whose tiles are blended by the kernel and on the host."""

    def __init__(self) -> None:
        self.weights = tiles.gaussian_weights(TILE)
        self.origins = [tiles.grid(h, w, TILE, 5) for _, h, w in SIZES]
        self.device = HostDevice()
        self.host = [
            self.device.mean(size, origins, self.weights)
            for size, origins in zip(SIZES, self.origins, strict=True)
        ]
        self.sums = [torch.zeros(size) for size in SIZES]
        self.weight_sums = [torch.from_numpy(mean.weight_sum) for mean in self.host]
        self.flags = torch.zeros(2, dtype=torch.int32)

    def slots(self) -> list[tuple[int, int, int]]:
        """Return all tiles of both canvases in random order, and an empty slot."""
        every = [(i, y, x) for i, origins in enumerate(self.origins) for y, x in origins]
        order = np.random.default_rng(3).permutation(len(every))
        return [every[i] for i in order] + [(-1, 0, 0)]

    def blend(self, batch: np.ndarray, slots: list[tuple[int, int, int]]) -> None:
        """Blend a batch with one launch, and on the host in the same order."""
        tile_blend(
            self.sums, self.flags, self.weight_sums, torch.from_numpy(batch), torch.from_numpy(self.weights),
            torch.tensor(slots),
        )  # fmt: skip
        for tile, (index, y, x) in zip(batch, slots, strict=True):
            if index >= 0:
                self.device.blend([Slot({}, {}, self.host[index], y, x)], tile[None])


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_blend_equals_the_host(batch):
    canvases = Canvases()
    slots = canvases.slots()
    data = np.random.default_rng(0).standard_normal((len(slots), 3, TILE, TILE)).astype(np.float32)
    for start in range(0, len(slots), batch):
        canvases.blend(data[start : start + batch], slots[start : start + batch])
    for got, want in zip(canvases.sums, canvases.host, strict=True):
        np.testing.assert_array_equal(got.numpy(), want.data)
    assert not canvases.flags.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_blend_flags_a_canvas_with_a_value_that_is_not_finite(bad):
    canvases = Canvases()
    slots = [(0, 0, 0), (1, 0, 0), (1, 0, 7)]
    data = np.zeros((3, 3, TILE, TILE), np.float32)
    data[2, 1, 11, 4] = bad
    canvases.blend(data, slots)
    assert canvases.flags.tolist() == [0, 1]
    assert torch.isfinite(canvases.sums[0]).all()


def test_blend_accepts_the_largest_finite_value():
    canvases = Canvases()
    data = np.full((1, 3, TILE, TILE), np.finfo(np.float32).max, np.float32)
    canvases.blend(data, [(0, 0, 0)])
    assert not canvases.flags.any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gathered_pixels_equal_the_host(dtype):
    image = np.arange(50 * 60 * 3).reshape(50, 60, 3) * 13
    image = (image % (np.iinfo(dtype).max + 1)).astype(dtype)
    want = np.empty((3, 16, 24), np.float32)
    to_unit(image[31:47, 33:57].transpose(2, 0, 1), want)
    slots = torch.tensor([[0, 31, 33, 5], [-1, 0, 0, 0]])
    got, t = tile_gather([torch.from_numpy(image)], slots, 16, 24, torch.float32)
    np.testing.assert_array_equal(got[0].numpy(), want)
    assert not got[1].any()
    assert t.tolist() == [5, 0]


@pytest.mark.parametrize("origin", [(-1, 0), (0, 14), (18, 0)])
def test_windows_outside_a_canvas_are_refused(origin):
    canvas, slots = torch.zeros(3, 29, 24), torch.tensor([[0, *origin, 1]])
    with pytest.raises(ValueError, match="leaves the canvas of 29x24"):
        tile_gather([canvas], slots, 12, 11, torch.float32)
    with pytest.raises(ValueError, match="leaves the canvas of 29x24"):
        tile_blend(
            [canvas], torch.zeros(1, dtype=torch.int32), [torch.ones(29, 24)], torch.zeros(1, 3, 12, 11),
            torch.ones(12, 11), slots[:, :3],
        )  # fmt: skip
