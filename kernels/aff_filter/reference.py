"""The adaptive frequency filter in its plainest form, with `torch.fft`: other forms are compared with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SLOPE = 0.1  # of the LeakyReLU between the two layers
SHRINK = 0.01  # soft-shrink threshold of the mask


def aff_filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """`irfft2(mask(rfft2(x)) * rfft2(x)) + x` with ortho scaling, in the precision of `x`.

    `x` [B, C, H, W]; the weights of both complex block-diagonal layers [2, blocks, C/blocks, C/blocks] as
    (real, imaginary) x (in, out), their biases [2, blocks, C/blocks]. W must be even.
    """
    spectrum = torch.fft.rfft2(x, norm="ortho")
    blocks = spectrum.unflatten(1, (w1.shape[1], -1))  # [B, blocks, C/blocks, H, W/2+1]
    hidden = _split(F.leaky_relu, _layer(blocks, w1, b1), SLOPE)
    mask = _split(F.softshrink, _layer(hidden, w2, b2), SHRINK)
    return torch.fft.irfft2(spectrum * mask.flatten(1, 2), s=x.shape[-2:], norm="ortho") + x


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    matrix = torch.complex(weight[0], weight[1])
    return torch.einsum("bkihw,kio->bkohw", x, matrix) + torch.complex(bias[0], bias[1])[..., None, None]


def _split(function: Callable[..., Tensor], x: Tensor, *arguments: float) -> Tensor:
    """Apply a real function to real and imaginary parts."""
    return torch.complex(function(x.real, *arguments), function(x.imag, *arguments))
