"""GroupNorm and SiLU by PyTorch's own functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6  # of the autoencoder's norms; the UNet's norms have 1e-5


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = EPS,
    channels_last: bool = False,
    silu: bool = True,
) -> Tensor:
    """Return `silu(group_norm(x))` of [B, C, H, W], or of [B, H, W, C] with `channels_last`."""
    if channels_last:
        x = x.permute(0, 3, 1, 2)
    y = F.group_norm(x, groups, weight, bias, eps)
    y = F.silu(y) if silu else y
    return y.permute(0, 2, 3, 1) if channels_last else y


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = EPS, silu: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias of `group_norm_silu` over [B, C, H, W]."""
    shape = (x.shape[0], groups, -1)
    variance, mean = torch.var_mean(x.reshape(shape), dim=2, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + eps)
    normed = ((x.reshape(shape) - mean) * inverse).reshape(x.shape)
    gain = weight[:, None, None]
    if silu:
        z = normed * gain + bias[:, None, None]
        gate = torch.sigmoid(z)
        grad = grad * gate * (1 + z * (1 - gate))
    inner, flat = (grad * gain).reshape(shape), normed.reshape(shape)
    centred = inner - inner.mean(2, keepdim=True) - flat * (inner * flat).mean(2, keepdim=True)
    sums = (0, 2, 3)
    return (centred * inverse).reshape(x.shape), (grad * normed).sum(sums), grad.sum(sums)
