"""`moesr::inverted_residual` for PyTorch, for inference: BatchNorm is folded in, and there is no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from moesr.kernels.dispatch import channels_last, has_plan, image_dims, in_layout, run_kernels, wide
from moesr.kernels.inverted_residual import reference
from moesr.kernels.inverted_residual.op import OP


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
    """Return `reference.inverted_residual` of [B, C, H, W] in the type and memory layout of x."""
    last = channels_last(x)
    shape = {**image_dims(x), "out": reduce.shape[0], "channels_last": int(last)}
    weights = (expand, expand_bias, depthwise, depthwise_bias, reduce, reduce_bias)
    if not has_plan(OP, shape, x):
        return in_layout(reference.inverted_residual(*wide(x, *weights)), x)
    inputs = {
        "x": x.permute(0, 2, 3, 1) if last else x,
        "expand": expand.to(x.dtype),
        "expand_bias": expand_bias,
        "depthwise": depthwise.to(x.dtype),
        "depthwise_bias": depthwise_bias,
        "reduce": reduce.to(x.dtype),
        "reduce_bias": reduce_bias,
    }
    y = run_kernels(OP, shape, inputs)["y"]
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
    return in_layout(x.new_empty((x.shape[0], reduce.shape[0], *x.shape[2:])), x)
