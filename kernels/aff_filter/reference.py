"""The adaptive frequency filter with `torch.fft`: the form that all others are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SLOPE = 0.1  # of the LeakyReLU between the two layers
SHRINK = 0.01  # soft-shrink threshold of the mask


def aff_filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Return `irfft2(mask(rfft2(x)) * rfft2(x)) + x` with ortho scaling, in the precision of `x`.

    `x` is [B, C, H, W] with an even W. The weights of the two complex block-diagonal layers are
    [2 (part), blocks, C/blocks (in), C/blocks (out)], their biases [2 (part), blocks, C/blocks].
    """
    spectrum = torch.fft.rfft2(x, norm="ortho")
    blocks = spectrum.unflatten(1, (w1.shape[1], -1))  # [B, blocks, C/blocks, H, W/2+1]
    hidden = _split(F.leaky_relu, _layer(blocks, w1, b1), SLOPE)
    mask = _split(F.softshrink, _layer(hidden, w2, b2), SHRINK)
    return torch.fft.irfft2(spectrum * mask.flatten(1, 2), s=x.shape[-2:], norm="ortho") + x


def aff_filter_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `aff_filter`'s arguments, in their order, from the gradient of its result.

    A complex gradient holds the gradients of the real and the imaginary part. In `irfft2` each frequency
    between DC and Nyquist represents two, so the adjoint of either transform is the other one with that
    weight.
    """
    size, weight = x.shape[-2:], _mirrored(x)
    spectrum = torch.fft.rfft2(x, norm="ortho")
    blocks = spectrum.unflatten(1, (w1.shape[1], -1))
    before = _layer(blocks, w1, b1)
    hidden = _split(F.leaky_relu, before, SLOPE)
    raw = _layer(hidden, w2, b2)
    mask = _split(F.softshrink, raw, SHRINK)
    product = torch.fft.rfft2(grad, norm="ortho").unflatten(1, (w1.shape[1], -1)) * weight
    open_ = torch.view_as_complex((torch.view_as_real(raw).abs() > SHRINK).to(x.dtype))
    inner, w2_grad, b2_grad = _layer_backward(_parts(product * blocks.conj(), open_), hidden, w2)
    slope = torch.view_as_complex(torch.where(torch.view_as_real(before) > 0, 1.0, SLOPE).to(x.dtype))
    outer, w1_grad, b1_grad = _layer_backward(_parts(inner, slope), blocks, w1)
    total = (product * mask.conj() + outer).flatten(1, 2) / weight
    return torch.fft.irfft2(total, s=size, norm="ortho") + grad, w1_grad, b1_grad, w2_grad, b2_grad


def _mirrored(x: Tensor) -> Tensor:
    """Return [W/2 + 1]: the number of frequencies of the full spectrum for each frequency of the half one."""
    weight = torch.full((x.shape[-1] // 2 + 1,), 2.0, dtype=x.dtype, device=x.device)
    weight[0] = weight[-1] = 1.0
    return weight


def _layer_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input, the weight and the bias of `_layer`."""
    matrix = torch.complex(weight[0], weight[1])
    inner = torch.einsum("bkohw,kio->bkihw", grad, matrix.conj())
    outer = torch.einsum("bkihw,bkohw->kio", x.conj(), grad)
    bias = grad.sum(dim=(0, 3, 4))
    return inner, torch.stack([outer.real, outer.imag]), torch.stack([bias.real, bias.imag])


def _parts(x: Tensor, y: Tensor) -> Tensor:
    """Multiply real part by real part and imaginary part by imaginary part."""
    return torch.complex(x.real * y.real, x.imag * y.imag)


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    matrix = torch.complex(weight[0], weight[1])
    return torch.einsum("bkihw,kio->bkohw", x, matrix) + torch.complex(bias[0], bias[1])[..., None, None]


def _split(function: Callable[..., Tensor], x: Tensor, *arguments: float) -> Tensor:
    """Apply a real function to the real and the imaginary part."""
    return torch.complex(function(x.real, *arguments), function(x.imag, *arguments))
