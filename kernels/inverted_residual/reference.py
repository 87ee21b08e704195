"""The inverted residual of the refinement network, with BatchNorm folded into its convolutions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SLOPE = 0.1  # of both LeakyReLUs


def inverted_residual(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor,
) -> Tensor:
    """Expand, convolve depthwise 3x3 and reduce [B, C, H, W]; x is added if the channels stay the same.

    `expand` is [inner, C], `depthwise` [inner, 3, 3] and `reduce` [out, inner]; the biases are [inner],
    [inner] and [out].
    """
    h = F.leaky_relu(F.conv2d(x, expand[..., None, None], expand_bias), SLOPE)
    h = F.conv2d(h, depthwise[:, None], depthwise_bias, padding=1, groups=h.shape[1])
    h = F.conv2d(F.leaky_relu(h, SLOPE), reduce[..., None, None], reduce_bias)
    return h + x if h.shape == x.shape else h


def fold(weight: Tensor, norm: torch.nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Fold an evaluating BatchNorm into the convolution before it; returns the weight and the bias."""
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * gain.view(-1, *[1] * (weight.dim() - 1)), norm.bias - norm.running_mean * gain
