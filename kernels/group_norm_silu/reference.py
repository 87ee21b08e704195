"""GroupNorm and SiLU as PyTorch writes them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6  # of the autoencoder's and the UNet's norms


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = EPS,
    channels_last: bool = False,
    silu: bool = True,
) -> Tensor:
    """`silu(group_norm(x))` of [B, C, H, W], or of [B, H, W, C] with `channels_last`."""
    if channels_last:
        x = x.permute(0, 3, 1, 2)
    y = F.group_norm(x, groups, weight, bias, eps)
    y = F.silu(y) if silu else y
    return y.permute(0, 2, 3, 1) if channels_last else y
