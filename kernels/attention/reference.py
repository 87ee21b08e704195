"""Attention that stores the whole matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens_last: bool = False) -> Tensor:
    """Return `softmax(scale q k^T) v`; heads [heads, tokens, width], swapped if `tokens_last`."""
    if tokens_last:
        return attention(q.mT, k.mT, v.mT, scale).mT.contiguous()
    return torch.softmax(scale * (q @ k.mT), dim=-1) @ v
