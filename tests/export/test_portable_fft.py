"""The matrix form of the adaptive frequency filter equals the form with `torch.fft` at any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import relative_l2
from torch import Tensor
from torch.nn import functional as F

from moesr.kernels.aff_filter import portable, reference

SIZES = [(8, 8), (16, 32), (24, 40), (34, 26), (64, 48), (96, 96), (120, 120), (128, 128), (7, 10)]


class TorchOps:
    """The operations of the matrix form in PyTorch, in the precision of the input."""

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    def reshape(self, x: Tensor, *shape: int) -> Tensor:
        return x.reshape(*(x.shape[i] if n == 0 else n for i, n in enumerate(shape)))

    def transpose(self, x: Tensor, *order: int) -> Tensor:
        return x.permute(order)

    def split(self, x: Tensor, axis: int, *sizes: int) -> list[Tensor]:
        return list(x.split(sizes, dim=axis))

    def concat(self, parts: list[Tensor], axis: int) -> Tensor:
        return torch.cat(parts, dim=axis)

    def sum(self, x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)

    def matmul(self, a, b) -> Tensor:
        tensors = [t if isinstance(t, Tensor) else torch.from_numpy(np.ascontiguousarray(t)) for t in (a, b)]
        return tensors[0] @ tensors[1]

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def pointwise(self, x: Tensor, weight: np.ndarray, bias: np.ndarray, groups: int) -> Tensor:
        return F.conv2d(x, torch.from_numpy(weight)[..., None, None], torch.from_numpy(bias), groups=groups)

    def leaky_relu(self, x: Tensor, slope: float) -> Tensor:
        return F.leaky_relu(x, slope)

    def soft_shrink(self, x: Tensor, threshold: float) -> Tensor:
        return F.softshrink(x, threshold)


def image(height: int, width: int, channels: int = 8) -> Tensor:
    return torch.randn(
        2, channels, height, width, generator=torch.Generator().manual_seed(height * 1000 + width)
    )


def filter_weights(channels: int, blocks: int) -> tuple[np.ndarray, ...]:
    rng, size = np.random.default_rng(5), channels // blocks
    shapes = [(2, blocks, size, size), (2, blocks, size)] * 2
    return tuple((rng.standard_normal(s) / np.sqrt(size)).astype(np.float32) for s in shapes)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_spectrum_equals_torch_fft(height, width):
    plan, x = portable.make_plan(height, width), image(height, width)
    spectrum = portable.rfft2(plan, x, TorchOps())
    n1, n2 = plan.factors
    rows = [k1 + n1 * k2 for k1 in range(n1) for k2 in range(n2)]
    columns = [*range(0, width // 2 + 1, 2), *range(1, width // 2 + 1, 2)]
    want = torch.fft.rfft2(x, norm="ortho")[:, :, rows][..., columns].unflatten(2, (n1, n2))
    got = torch.complex(spectrum[:, :, :, 0], spectrum[:, :, :, 1])
    assert relative_l2(torch.view_as_real(got).numpy(), torch.view_as_real(want).numpy()) < 2e-6


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_inverse_transform_restores_the_image(height, width):
    plan, x = portable.make_plan(height, width), image(height, width)
    back = portable.irfft2(plan, portable.rfft2(plan, x, TorchOps()), TorchOps())
    assert relative_l2(back.numpy(), x.numpy()) < 2e-6


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_filter_equals_reference(height, width):
    """The mask breaks the symmetry of the spectrum, so a use of the wrong half would show."""
    x, weights = image(height, width, channels=16), filter_weights(16, 4)
    got = portable.aff_filter(portable.make_plan(height, width), x, weights, TorchOps())
    want = reference.aff_filter(x.double(), *(torch.from_numpy(w).double() for w in weights))
    assert relative_l2((got - x).numpy(), (want - x.double()).numpy()) < 3e-6


@pytest.mark.parametrize("first_factor", [1, 4, 8], ids=["dense", "4x16", "8x8"])
def test_every_factorisation_gives_the_same_result(first_factor):
    x, weights = image(64, 64, channels=16), filter_weights(16, 4)
    got = portable.aff_filter(portable.make_plan(64, 64, first_factor), x, weights, TorchOps())
    want = reference.aff_filter(x, *(torch.from_numpy(w) for w in weights))
    assert relative_l2(got.numpy(), want.numpy()) < 2e-6


def test_matrices_of_the_stages_are_orthogonal():
    plan = portable.make_plan(96, 32)
    np.testing.assert_allclose(plan.stage_1 @ plan.stage_1.T, np.eye(len(plan.stage_1)), atol=1e-6)
    for stage in plan.stage_2:
        np.testing.assert_allclose(stage @ stage.T, np.eye(len(stage)), atol=1e-6)


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="even, got 15"):
        portable.make_plan(16, 15)


def test_published_filter_matches_golden(golden, published_weights):
    """The golden holds the output of the filter alone."""
    data, weights = golden("decoder_c32"), published_weights("decoder_c32", "dev")
    mine = tuple(np.asarray(weights[f"decoder.unet_1.conv1.filter.{n}"]) for n in ("w1", "b1", "w2", "b2"))
    x = torch.from_numpy(data["aff_in"])
    got = portable.aff_filter(portable.make_plan(*x.shape[2:]), x, mine, TorchOps())
    assert data.error("aff_filter_out", got.numpy()) < 1e-5
    plain = reference.aff_filter(x, *map(torch.from_numpy, mine))
    assert data.error("aff_filter_out", plain.numpy()) < 1e-5
