"""The kernels as PyTorch operators: `torch.ops.moesr.*`, launched on CUDA, the reference elsewhere.

Each has a fake, so that torch.compile goes through it, and a backward where training needs one. The `*_kernels`
functions are the CUDA sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesr.kernels.aff_filter import reference as aff
from moesr.kernels.attention.operator import attention
from moesr.kernels.dispatch import has_plan, run_kernels
from moesr.kernels.group_norm_silu import reference as norm
from moesr.kernels.inverted_residual import reference as residual
from moesr.kernels.plan import Shape
from moesr.kernels.registry import OPS
from moesr.kernels.sampler_step.operator import sampler_step
from moesr.kernels.tile_blend.operator import tile_blend
from moesr.kernels.tile_gather.operator import tile_gather
from moesr.kernels.vq_nearest.operator import vq_nearest

__all__ = [
    "aff_filter",
    "attention",
    "group_norm_silu",
    "inverted_residual",
    "sampler_step",
    "tile_blend",
    "tile_gather",
    "vq_nearest",
]


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Half precision as float32, which the CPU's transforms and sums want; float64 stays."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def _dims(x: Tensor) -> dict[str, int]:
    return dict(zip(("batch", "channels", "height", "width"), x.shape, strict=True))


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y in the type and the memory layout of x."""
    layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
    return y.to(x.dtype).contiguous(memory_format=layout)


def _empty(x: Tensor, channels: int) -> Tensor:
    layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
    return x.new_empty((x.shape[0], channels, *x.shape[2:])).contiguous(memory_format=layout)


# --- aff_filter


@torch.library.custom_op("moesr::aff_filter", mutates_args=())
def aff_filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """`kernels/aff_filter`: [B, C, H, W] filtered, plus x; contiguous, in x's type."""
    return aff.aff_filter(*_wide(x, w1, b1, w2, b2)).to(x.dtype).contiguous()


@aff_filter.register_kernel("cuda")
def aff_filter_kernels(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The kernels, or cuFFT where no tiling fits."""
    shape = {**_dims(x), "blocks": w1.shape[1]}
    if not has_plan(OPS["aff_filter"], shape, x):
        return aff.aff_filter(*_wide(x, w1, b1, w2, b2)).to(x.dtype).contiguous()
    inputs = {"x": x.contiguous(), "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return run_kernels(OPS["aff_filter"], shape, inputs)["y"]


@aff_filter.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _aff_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    saved = ctx.saved_tensors
    grads = aff.aff_filter_backward(*_wide(grad, *saved))
    return tuple(g.to(s.dtype) for g, s in zip(grads, saved, strict=True))


aff_filter.register_autograd(
    _aff_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


# --- group_norm_silu


@torch.library.custom_op("moesr::group_norm_silu", mutates_args=())
def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool = True) -> Tensor:
    """`kernels/group_norm_silu` of [B, C, H, W] with eps 1e-6, in x's type and memory layout."""
    return _shaped(norm.group_norm_silu(*_wide(x, weight, bias), groups, silu=silu), x)


@group_norm_silu.register_kernel("cuda")
def group_norm_silu_kernels(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool = True
) -> Tensor:
    """The kernels, for NCHW and NHWC memory."""
    last = _channels_last(x)
    shape: Shape = {**_dims(x), "groups": groups, "channels_last": int(last), "silu": int(silu)}
    if not has_plan(OPS["group_norm_silu"], shape, x):
        return _shaped(norm.group_norm_silu(*_wide(x, weight, bias), groups, silu=silu), x)
    value = x.permute(0, 2, 3, 1) if last else x.contiguous()
    inputs = {"x": value, "weight": weight.float(), "bias": bias.float()}
    y = run_kernels(OPS["group_norm_silu"], shape, inputs)["y"]
    return y.permute(0, 3, 1, 2) if last else y


@group_norm_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool = True) -> Tensor:
    return _empty(x, x.shape[1])


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.groups, ctx.silu = inputs[3:]


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = norm.group_norm_silu_backward(*_wide(grad, *saved), ctx.groups, silu=ctx.silu)
    return (*(g.to(s.dtype) for g, s in zip(grads, saved, strict=True)), None, None)


group_norm_silu.register_autograd(_norm_backward, setup_context=_norm_context)


# --- inverted_residual: BatchNorm is folded, so it is for inference alone and has no backward


@torch.library.custom_op("moesr::inverted_residual", mutates_args=())
def inverted_residual(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor,
) -> Tensor:
    """`kernels/inverted_residual` of [B, C, H, W], in x's type and memory layout."""
    weights = (expand, expand_bias, depthwise, depthwise_bias, reduce, reduce_bias)
    return _shaped(residual.inverted_residual(*_wide(x, *weights)), x)


@inverted_residual.register_kernel("cuda")
def inverted_residual_kernels(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor,
) -> Tensor:
    """The kernel, for NCHW and NHWC memory."""
    last = _channels_last(x)
    inputs = {
        "x": x.permute(0, 2, 3, 1) if last else x.contiguous(),
        "expand": expand.to(x.dtype),
        "expand_bias": expand_bias,
        "depthwise": depthwise.to(x.dtype),
        "depthwise_bias": depthwise_bias,
        "reduce": reduce.to(x.dtype),
        "reduce_bias": reduce_bias,
    }
    shape = {**_dims(x), "out": reduce.shape[0], "channels_last": int(last)}
    if not has_plan(OPS["inverted_residual"], shape, x):
        return _shaped(residual.inverted_residual(*_wide(x, *list(inputs.values())[1:])), x)
    y = run_kernels(OPS["inverted_residual"], shape, inputs)["y"]
    return y.permute(0, 3, 1, 2) if last else y


@inverted_residual.register_fake
def _(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    reduce: Tensor,
    reduce_bias: Tensor,
) -> Tensor:
    return _empty(x, reduce.shape[0])
