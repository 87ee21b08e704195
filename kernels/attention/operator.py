"""`moesr::attention`, which has gradients, and `moesr::attention_packed` for PyTorch.

`torch.compile` keeps both as single operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesr.kernels.attention.op import OP, baseline
from moesr.kernels.dispatch import has_plan, run_buffers


@torch.library.custom_op("moesr::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens_last: bool = False) -> Tensor:
    """Return `softmax(scale q k^T) v` of heads [heads, tokens, width].

    With `tokens_last` heads are [heads, width, tokens]. PyTorch's own attention runs outside a GPU and for
    widths that are not a power of two from 16 to 512. ValueError is raised for other shapes and mixed types.
    """
    if q.ndim != 3 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        got = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ValueError(f"q, k and v must be of one type and one shape [heads, tokens, width], got {got}")
    shape = _shape(q, tokens_last)
    if not has_plan(OP, shape, q):
        return baseline(q, k, v, scale, tokens_last).contiguous()
    return run_buffers(OP, shape, q, {"q": q, "k": k, "v": v}, {"scale": scale})["out"]


def _shape(head: Tensor, tokens_last: bool) -> dict[str, int]:
    tokens, width = head.shape[-2:] if not tokens_last else (head.shape[-1], head.shape[-2])
    return {"heads": len(head), "tokens": tokens, "width": width, "tokens_last": int(tokens_last)}


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, tokens_last: bool = False) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.scale, ctx.tokens_last = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Recompute the whole matrix of scores, which is small: training attends over a few hundred tokens."""
    q, k, v = ctx.saved_tensors
    if ctx.tokens_last:
        q, k, v, grad = q.mT, k.mT, v.mT, grad.mT
    weights = torch.softmax(ctx.scale * (q @ k.mT), dim=-1)
    pulled = grad @ v.mT
    scores = ctx.scale * weights * (pulled - (weights * pulled).sum(-1, keepdim=True))
    grads = scores @ k, scores.mT @ q, weights.mT @ grad
    return *((g.mT if ctx.tokens_last else g) for g in grads), None, None


attention.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("moesr::attention_packed", mutates_args=())
def attention_packed(qkv: Tensor, scale: float) -> Tensor:
    """Return `attention` of [heads, 3 (q, k, v), width, tokens] as [heads, width, tokens]; no gradient."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be [heads, 3, width, tokens], got {tuple(qkv.shape)}")
    shape = {**_shape(qkv, True), "packed": 1}
    if not has_plan(OP, shape, qkv):
        q, k, v = qkv.unbind(1)
        return baseline(q, k, v, scale, True)
    return run_buffers(OP, shape, qkv, {"qkv": qkv}, {"scale": scale})["out"]


@attention_packed.register_fake
def _(qkv: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])
