"""`moesr::aff_filter` for PyTorch, with gradients; `torch.compile` keeps it as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesr.kernels.aff_filter import reference
from moesr.kernels.aff_filter.op import OP
from moesr.kernels.dispatch import has_plan, image_dims, run_kernels, wide


@torch.library.custom_op("moesr::aff_filter", mutates_args=())
def aff_filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Compute `reference.aff_filter` of [B, C, H, W]; the result is contiguous and in the type of x.

    Outside a GPU, and for heights without a tiling, the reference runs; it computes half precision in
    float32.
    """
    shape = {**image_dims(x), "blocks": w1.shape[1]}
    if not has_plan(OP, shape, x):
        return reference.aff_filter(*wide(x, w1, b1, w2, b2)).to(x.dtype).contiguous()
    inputs = {"x": x.contiguous(), "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return run_kernels(OP, shape, inputs)["y"]


@aff_filter.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    saved = ctx.saved_tensors
    grads = reference.aff_filter_backward(*wide(grad, *saved))
    return tuple(g.to(s.dtype) for g, s in zip(grads, saved, strict=True))


aff_filter.register_autograd(_backward, setup_context=_save)
