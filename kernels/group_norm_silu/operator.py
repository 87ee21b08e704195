"""`moesr::group_norm_silu` for PyTorch, with gradients; `torch.compile` keeps it as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesr.kernels.dispatch import channels_last, has_plan, image_dims, in_layout, run_buffers, wide
from moesr.kernels.group_norm_silu import reference
from moesr.kernels.group_norm_silu.op import OP


@torch.library.custom_op("moesr::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool = True, eps: float = reference.EPS
) -> Tensor:
    """Return `silu(group_norm(x))` of [B, C, H, W] in the type and memory layout of x."""
    last = channels_last(x)
    shape = {**image_dims(x), "groups": groups, "channels_last": int(last), "silu": int(silu)}
    if not has_plan(OP, shape, x):
        value, gain, offset = wide(x, weight, bias)
        return in_layout(reference.group_norm_silu(value, gain, offset, groups, eps, silu=silu), x)
    given = {"x": x.permute(0, 2, 3, 1) if last else x, "weight": weight.float(), "bias": bias.float()}
    y = run_buffers(OP, shape, x, given, {"eps": eps})["y"]
    return y.permute(0, 3, 1, 2) if last else y


@group_norm_silu.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool = True, eps: float = reference.EPS
) -> Tensor:
    return in_layout(x.new_empty(x.shape), x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.groups, ctx.silu, ctx.eps = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    pulled, x, weight, bias = wide(grad, *saved)
    grads = reference.group_norm_silu_backward(pulled, x, weight, bias, ctx.groups, ctx.eps, ctx.silu)
    return (*(g.to(s.dtype) for g, s in zip(grads, saved, strict=True)), None, None, None)


group_norm_silu.register_autograd(_backward, setup_context=_save)
