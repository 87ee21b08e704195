"""The focal frequency loss matches its published value and its authors' package; the other losses."""

from __future__ import annotations

import pytest
import torch
from benchlib import metrics
from torch import Tensor

from moesr.runtime.images.color import wavelet
from moesr.training.losses.losses import (
    COLOR_PX,
    color_loss,
    focal_frequency_loss,
    gradient_loss,
    spectral_weights,
    wavelet_colors,
)


def images(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    pred, target = (torch.rand(shape, dtype=dtype, generator=generator) for _ in range(2))
    return pred, target


@pytest.mark.parametrize("shape", [(2, 3, 64, 40), (1, 1, 5, 9)], ids=str)
def test_wavelet_colors_equal_the_runtime(shape):
    content, style = images(*shape, dtype=torch.float32)
    want = torch.from_numpy(wavelet(content.numpy(), style.numpy()))
    torch.testing.assert_close(wavelet_colors(content, style), want, atol=1e-6, rtol=0)


def test_focal_frequency_loss_equals_the_published_value(golden):
    data = golden("colour_and_ffl")
    got = focal_frequency_loss(torch.from_numpy(data["ffl_pred"]), torch.from_numpy(data["ffl_target"]))
    assert float(got) == pytest.approx(float(data["ffl"]), rel=1e-6)


@pytest.mark.parametrize("log_matrix", [False, True], ids=["plain", "log"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (2, 1, 7, 33), (3, 4, 1, 5)], ids=str)
def test_focal_frequency_loss_equals_the_package_of_its_authors(shape, alpha, log_matrix):
    package = pytest.importorskip("focal_frequency_loss")
    pred, target = images(*shape)
    want = package.FocalFrequencyLoss(alpha=alpha, log_matrix=log_matrix)(pred, target)
    torch.testing.assert_close(focal_frequency_loss(pred, target, alpha, log_matrix), want, rtol=1e-9, atol=0)


def test_with_alpha_0_it_is_the_mean_squared_error():
    pred, target = images(2, 3, 9, 12)
    want = torch.nn.functional.mse_loss(pred, target)
    torch.testing.assert_close(focal_frequency_loss(pred, target, alpha=0.0), want)


def test_gradient_with_alpha_0():
    pred, target = images(2, 2, 5, 6)
    assert torch.autograd.gradcheck(
        lambda p: focal_frequency_loss(p, target, alpha=0.0), pred.requires_grad_()
    )


@pytest.mark.parametrize("log_matrix", [False, True], ids=["plain", "log"])
def test_gradient_holds_the_weights_constant(log_matrix):
    pred, target = images(1, 2, 6, 5)
    pred.requires_grad_()
    (got,) = torch.autograd.grad(focal_frequency_loss(pred, target, 1.0, log_matrix), pred)

    with torch.no_grad():  # d/dp mean(w |F(p - t)|^2) = 2/N F^H w F (p - t)
        spectrum = torch.fft.fft2(pred - target, norm="ortho")
        weighted = spectral_weights(spectrum.abs().square(), 1.0, log_matrix) * spectrum
        want = 2 / pred.numel() * torch.fft.ifft2(weighted, norm="ortho").real
    torch.testing.assert_close(got, want)


def test_largest_weight_of_each_image_and_channel_is_1():
    pred, target = images(2, 3, 8, 8)
    pred[0] *= 100
    weights = spectral_weights(torch.fft.fft2(pred - target).abs().square(), 1.0)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.amax(dim=(-2, -1)), torch.ones(2, 3, dtype=torch.float64))


def test_equal_images_have_no_loss_and_no_gradient():
    pred, _ = images(1, 3, 8, 8)
    target = pred.clone()
    loss = focal_frequency_loss(pred.requires_grad_(), target)
    loss.backward()
    assert loss == 0
    assert pred.grad is not None and not pred.grad.any()


def test_half_precision_inputs_are_computed_in_float32():
    pred, target = images(1, 3, 7, 9, dtype=torch.bfloat16)
    got = focal_frequency_loss(pred, target)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, focal_frequency_loss(pred.float(), target.float()))


@pytest.mark.parametrize("shapes", [((1, 3, 8, 8), (1, 3, 8, 9)), ((3, 8, 8), (3, 8, 8))], ids=str)
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="of equal shape"):
        focal_frequency_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_color_loss_compares_means_of_areas_only():
    pred, target = images(2, 3, 4 * COLOR_PX, 2 * COLOR_PX)
    shuffled = pred.roll(3, dims=-1)  # pixels move across the borders of areas
    areas = pred.unflatten(-1, (-1, COLOR_PX)).roll(3, dims=-1).flatten(-2)
    assert float(color_loss(areas, pred)) < 1e-12 < float(color_loss(shuffled, pred))
    assert float(color_loss(pred + 0.25, pred)) == pytest.approx(0.25)
    assert torch.autograd.gradcheck(lambda x: color_loss(x, target), pred.requires_grad_())


def test_gradient_loss_equals_the_benchmarks_gradient_similarity():
    images = torch.randint(256, (2, 3, 40, 28), generator=torch.Generator().manual_seed(0)).double()
    for edge in (images[..., :4, :], images[..., -4:, :], images[..., :, :4], images[..., :, -4:]):
        edge[:] = 90.0  # flat borders, so that padding does not matter
    pred, target = images[:1], images[1:]
    y_pred, y_target = (metrics.luma(image[0].permute(1, 2, 0).numpy()) for image in (pred, target))
    # the similarity is a mean over the image at half size
    dissimilar = (1.0 - metrics.gradient_similarity(y_pred, y_target)) * 20 * 14
    got = gradient_loss(pred / 127.5 - 1.0, target / 127.5 - 1.0)
    assert float(got) * 18 * 12 == pytest.approx(dissimilar, rel=1e-6)


def test_gradient_loss_of_flat_images_has_a_finite_gradient():
    pred, target = images(1, 3, 8, 8)
    assert torch.autograd.gradcheck(lambda x: gradient_loss(x, target), pred.requires_grad_())
    flat = torch.zeros(1, 3, 8, 8, requires_grad=True)
    gradient_loss(flat, target.float()).backward()
    assert flat.grad is not None and bool(flat.grad.isfinite().all())
