"""`moesr::attention` for PyTorch: compiled graphs keep it whole, and gradients flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesr.kernels.attention import reference
from moesr.kernels.attention.op import OP
from moesr.kernels.dispatch import has_kernels, run_buffers


@torch.library.custom_op("moesr::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens_last: bool = False) -> Tensor:
    """`softmax(scale q k^T) v` of heads [heads, tokens, width], or [heads, width, tokens] with `tokens_last`.

    The width is a power of two from 16 to 512; other shapes and mixed types are a ValueError.
    """
    if q.ndim != 3 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        got = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ValueError(f"q, k and v must be of one type and one shape [heads, tokens, width], got {got}")
    if not has_kernels(q):
        return reference.attention(q, k, v, scale, tokens_last)
    tokens, width = q.shape[1:] if not tokens_last else q.shape[:0:-1]
    shape = {"heads": len(q), "tokens": tokens, "width": width, "tokens_last": int(tokens_last)}
    return run_buffers(OP, shape, q, {"q": q, "k": k, "v": v}, {"scale": scale})["out"]


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens_last: bool = False) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.scale, ctx.tokens_last = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Scores are made again, whole: training attends over a few hundred tokens."""
    q, k, v = ctx.saved_tensors
    if ctx.tokens_last:
        q, k, v, grad = q.mT, k.mT, v.mT, grad.mT
    weights = torch.softmax(ctx.scale * (q @ k.mT), dim=-1)
    pulled = grad @ v.mT
    scores = ctx.scale * weights * (pulled - (weights * pulled).sum(-1, keepdim=True))
    grads = scores @ k, scores.mT @ q, weights.mT @ grad
    return *((g.mT if ctx.tokens_last else g) for g in grads), None, None


attention.register_autograd(_backward, setup_context=_save)
