"""The blind degradation: statistics of each step, and shape, range and reproducibility of the result."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage import data
from torch import Tensor

from moesr.runtime.images.resize import imresize
from moesr.training.data import degradation
from moesr.training.data.blur import bell_kernels, filter2d, sinc_kernels
from moesr.training.data.degradation import (
    BlindDegradation,
    ClassicalDegradation,
    Draw,
    bicubic,
    degrade_blind,
)

CONFIG = BlindDegradation()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return torch.from_numpy(data.chelsea()[100:196, 100:228].copy()).permute(2, 0, 1)[None].float() / 255


def bell(sigma_x=2.0, sigma_y=2.0, angle=0.0, beta=1.0, plateau=False, side=21) -> Tensor:
    shape = vector(sigma_x), vector(sigma_y), vector(angle), vector(beta)
    return bell_kernels(torch.tensor([side]), *shape, torch.tensor([plateau]))[0]


def covariance(kernel: Tensor) -> Tensor:
    """Return the second moments [[xx, xy], [xy, yy]] of a kernel."""
    axis = torch.arange(-10.0, 11, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    moments = [(kernel * a * b).sum() for a, b in ((x, x), (x, y), (x, y), (y, y))]
    return torch.stack(moments).reshape(2, 2)


@pytest.mark.parametrize(
    ("sigma_x", "sigma_y", "angle"),
    [(1.5, 1.5, 0.0), (2.0, 1.0, 0.0), (2.0, 1.0, math.pi / 2), (2.2, 1.1, 0.6)],
    ids=["isotropic", "along x", "along y", "turned"],
)
def test_gaussian_kernels_have_the_requested_covariance(sigma_x, sigma_y, angle):
    kernel = bell(sigma_x, sigma_y, angle)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    want = turn @ torch.diag(vector(sigma_x**2, sigma_y**2)) @ turn.T
    assert float(kernel.sum()) == pytest.approx(1)
    torch.testing.assert_close(covariance(kernel), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plateau", [False, True], ids=["generalised", "plateau"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_profiles_of_generalised_and_plateau_kernels(beta, plateau):
    kernel = bell(sigma_x=4.0, sigma_y=4.0, beta=beta, plateau=plateau)
    r = torch.arange(0.0, 11, dtype=torch.float64)
    q = (r / 4) ** (2 * beta)
    want = 1 / (1 + q) if plateau else torch.exp(-q / 2)
    torch.testing.assert_close(kernel[10, 10:] / kernel[10, 10], want)


@pytest.mark.parametrize("side", [7, 13, 21])
def test_kernels_are_zero_outside_their_side(side):
    sides = torch.tensor([side])
    for kernel in (bell(5.0, 5.0, side=side), sinc_kernels(sides, vector(1.5))[0]):
        inside = kernel[10 - side // 2 : 11 + side // 2, 10 - side // 2 : 11 + side // 2]
        assert (inside != 0).all() and (kernel != 0).sum() == side * side
        assert float(kernel.sum()) == pytest.approx(1)


@pytest.mark.parametrize("cutoff", [math.pi / 3, math.pi / 2])
def test_sinc_kernel_cuts_off_at_its_frequency(cutoff):
    kernel = sinc_kernels(torch.tensor([21]), vector(cutoff))[0]
    response = torch.fft.fft2(kernel, s=(256, 256)).abs()[0, :129]  # 0 to pi radians per pixel
    omega = torch.linspace(0, math.pi, 129)
    assert (response[omega < 0.75 * cutoff] - 1).abs().max() < 0.15
    assert response[omega > 1.25 * cutoff].max() < 0.12
    assert float(response[(omega - cutoff).abs().argmin()]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("size", [(24, 31), (9, 12)], ids=["mirrored", "smaller than the kernel"])
def test_filter_applies_one_kernel_per_image(size):
    x = torch.rand(2, 3, *size, dtype=torch.float64, generator=seeded())
    kernels = torch.stack([bell(2.0, 0.8, 0.5), bell(1.0, 1.0, side=7)])
    mode = "mirror" if min(size) > 10 else "nearest"
    want = [
        [ndimage.correlate(c, k, mode=mode) for c in i]
        for i, k in zip(x.numpy(), kernels.numpy(), strict=True)
    ]
    np.testing.assert_allclose(filter2d(x, kernels), want, atol=1e-12)


def test_random_kernels_follow_the_published_probabilities():
    kernels = degradation.blur_kernels(ClassicalDegradation(), 2000, Draw(seeded()))
    torch.testing.assert_close(kernels.sum(dim=(1, 2)), torch.ones(2000, dtype=torch.float64))
    round_ones = ((kernels - kernels.transpose(1, 2)).abs().amax(dim=(1, 2)) < 1e-12).double().mean()
    assert float(round_ones) == pytest.approx(0.1 + 0.9 * (0.45 + 0.12 + 0.12), abs=0.04)
    rings = (kernels < 0).any(dim=2).any(dim=1).double().mean()  # only sinc kernels have negative values
    assert float(rings) == pytest.approx(0.1, abs=0.03)


def test_final_kernels_are_sinc_or_identity():
    kernels = degradation.final_kernels(1000, 0.8, Draw(seeded()))
    identity = (kernels[:, 10, 10] == 1.0).double().mean()
    assert float(identity) == pytest.approx(0.2, abs=0.05)


def test_random_draws_have_the_requested_distributions():
    draw = Draw(seeded())
    assert set(draw.sides(200).tolist()) == {7, 9, 11, 13, 15, 17, 19, 21}
    assert set(draw.qualities((30, 33), 200)) == {30, 31, 32, 33}
    beta = draw.beta((0.5, 4.0), 4000)
    assert 0.5 <= beta.min() < 0.52 and 3.9 < beta.max() < 4.0
    assert float((beta < 1).double().mean()) == pytest.approx(0.5, abs=0.03)
    counts = torch.bincount(draw.choice((0.2, 0.7, 0.1), 4000)) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.2, 0.7, 0.1]), atol=0.03, rtol=0)


def test_resize_factors_follow_the_published_probabilities():
    stage = dataclasses.replace(ClassicalDegradation(), blur=0.0)
    draw, x = Draw(seeded()), torch.full((1, 3, 100, 40), 0.5)
    sizes = [tuple(degradation._distort(x, stage, (100, 40), draw).shape[2:]) for _ in range(300)]
    heights = np.array([height for height, _ in sizes])
    assert heights.min() >= 15 and heights.max() <= 150
    assert np.mean(heights == 100) == pytest.approx(0.1, abs=0.06)
    assert np.mean(heights > 100) == pytest.approx(0.2, abs=0.08)
    assert all(abs(width - height * 0.4) <= 1 for height, width in sizes)


@pytest.mark.parametrize("sigma", [2.0, 25.0])
def test_gaussian_noise_has_the_requested_deviation(sigma):
    x = torch.full((2, 3, 160, 160), 0.5)
    grey = torch.tensor([False, True])
    noise = degradation.gaussian_noise(x, vector(sigma, 2 * sigma), grey, seeded()) - x
    assert noise[0].std() * 255 == pytest.approx(sigma, rel=0.02)
    assert noise[1].std() * 255 == pytest.approx(2 * sigma, rel=0.02)
    assert abs(float(noise.mean())) < 1e-3
    assert torch.equal(noise[1, 0], noise[1, 2])
    correlation = torch.corrcoef(noise[0].flatten(1))
    assert (correlation - torch.eye(3)).abs().max() < 0.03


def test_poisson_noise_has_the_variance_of_counts():
    ramp = torch.linspace(0, 1, 256).expand(2, 3, 512, 256)
    x = ramp.clone()
    noise = degradation.poisson_noise(x, vector(1.0, 0.5), torch.tensor([False, True]), seeded()) - x
    middle = slice(64, 192)  # away from black and white, since clipping changes the statistics there
    variance = noise[..., middle].square().mean(dim=2) / x[:, :, 0, middle]  # per grey level
    # with 256 levels the variance is value / 256
    assert variance[0].mean() * 256 == pytest.approx(1.0, rel=0.03)
    assert variance[1].mean() * 256 == pytest.approx(0.25, rel=0.03)
    assert torch.equal(noise[1, 0], noise[1, 2]) and not torch.equal(noise[0, 0], noise[0, 2])


def test_poisson_counts_follow_the_levels_of_each_image():
    few = torch.tensor([0.4, 0.5, 0.6]).repeat(100 * 40).reshape(1, 1, 100, 120).expand(1, 3, -1, -1)
    noise = degradation.poisson_noise(few, vector(0.1), torch.tensor([False]), seeded()) - few
    # an image of three values is given four counts for white
    assert noise.var() == pytest.approx(0.5 / 4 * 0.1**2, rel=0.05)


def test_noise_stays_in_range():
    x = torch.tensor([0.0, 1.0]).repeat(50).reshape(1, 1, 10, 10).expand(1, 3, -1, -1)
    grey = torch.tensor([False])
    for noisy in (
        degradation.gaussian_noise(x, vector(30.0), grey, seeded()),
        degradation.poisson_noise(x, vector(3.0), grey, seeded()),
    ):
        assert noisy.min() >= 0 and noisy.max() <= 1


def test_jpeg_loses_more_at_lower_quality(photo):
    qualities = [95, 80, 60, 40, 30]
    coded = degradation.jpeg(photo.expand(5, -1, -1, -1), qualities)
    errors = (coded - photo).square().mean(dim=(1, 2, 3))
    assert errors.tolist() == sorted(errors.tolist())
    assert errors[0] < 0.2 * errors[-1]


def test_jpeg_equals_pillow(photo):
    pixels = (photo[0].permute(1, 2, 0) * 255).byte().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=50)
    want = torch.from_numpy(np.asarray(Image.open(stream)).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(degradation.jpeg(photo, [50])[0], want)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 12), (3, 64, 96)], ids=["tiny", "batch"])
def test_result_has_the_lr_size_and_8_bit_values(batch, height, width, seed, photo):
    hr = photo[..., :height, :width].expand(batch, -1, -1, -1)
    lr = degrade_blind(hr, CONFIG, seeded(seed))
    assert lr.shape == (batch, 3, height // 4, width // 4) and lr.dtype == torch.float32
    assert lr.min() >= 0 and lr.max() <= 1
    torch.testing.assert_close(lr * 255, (lr * 255).round(), atol=1e-4, rtol=0)


def test_same_seed_gives_the_same_result(photo):
    hr = photo.expand(2, -1, -1, -1)
    first, again, other = (degrade_blind(hr, CONFIG, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # each image has its own kernels and noise


def test_draws_do_not_use_the_global_generator(photo):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    degrade_blind(photo, CONFIG, seeded())
    assert torch.equal(torch.rand(3), want)


def test_result_resembles_the_image_but_is_degraded(photo):
    clean = bicubic(photo, 4)
    psnr = [
        float(-10 * torch.log10((degrade_blind(photo, CONFIG, seeded(s)) - clean).square().mean()))
        for s in range(12)
    ]
    assert 15 < float(np.median(psnr)) < 32
    assert max(psnr) - min(psnr) > 3  # from mild to severe


def test_the_input_is_not_changed(photo):
    before = photo.clone()
    degrade_blind(photo, CONFIG, seeded())
    assert torch.equal(photo, before)


@pytest.mark.parametrize("scale", [4, 8])
def test_bicubic_equals_matlab_on_bytes(scale, photo):
    pixels = (photo[0].permute(1, 2, 0) * 255).round().byte().numpy()
    want = imresize(pixels, 96 // scale, 128 // scale)
    got = bicubic(photo, scale)[0].permute(1, 2, 0) * 255
    np.testing.assert_array_equal(got.round().byte().numpy(), want)


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(1, 3, 30, 32),
        torch.zeros(3, 32, 32),
        torch.zeros(1, 1, 32, 32),
        torch.zeros(1, 3, 8, 8).byte(),
    ],
    ids=["side", "axes", "channels", "dtype"],
)
def test_images_of_other_shape_or_type_are_refused(bad):
    for make in (lambda: bicubic(bad, 4), lambda: degrade_blind(bad, CONFIG, seeded())):
        with pytest.raises(ValueError, match="expected float images"):
            make()
