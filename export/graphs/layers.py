"""Layers that the graphs share: trained modules written as ONNX nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from moesr.export.graphs import open_sizes, winograd
from moesr.export.graphs.builder import GraphBuilder, Value
from moesr.export.graphs.strips import LazyValue
from moesr.export.lowering import cut

PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # (row, column) of an upsampled pixel in its 2x2 block
MERGE = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
"""Merges three taps over doubled samples into two: phase 0 reads (i-1, i, i), phase 1 reads (i, i, i+1)."""

EXACT_SUM = 1 << 12  # the largest number of elements whose mean ONNX Runtime computes accurately enough


def conv(
    g: GraphBuilder,
    x: Value | LazyValue,
    weight: Tensor | Value,
    bias: Tensor | None,
    pads: Sequence[int] | None = None,
    stride: int = 1,
    groups: int = 1,
) -> Value:
    """Write a 2-D convolution; `pads` (top, left, bottom, right) keep the size by default."""
    kernel = [int(k) for k in weight.shape[2:]]
    pads = [k // 2 for k in kernel] * 2 if pads is None else list(pads)
    height, width = (x.size(axis) + pads[axis - 2] + pads[axis] - kernel[axis - 2] + 1 for axis in (2, 3))
    square = stride == groups == 1 and kernel[0] == kernel[1]
    if isinstance(weight, Tensor) and square and winograd.chosen(g, weight.shape, height, width):
        return winograd.multiply(g, [winograd.transform_input(g, x, kernel[0], pads)], weight, bias, width)
    attributes = {"kernel_shape": kernel, "pads": pads, "strides": [stride, stride], "group": groups}
    return g.op("Conv", x.whole() if isinstance(x, LazyValue) else x, weight, bias, **attributes)


def conv_module(
    g: GraphBuilder, x: Value | LazyValue, module: nn.Module, pads: Sequence[int] | None = None
) -> Value:
    """Write a trained `Conv2d`, or a `Conv1d` of kernel 1 over flattened positions."""
    assert isinstance(module, (nn.Conv2d, nn.Conv1d))
    weight = module.weight if module.weight.dim() == 4 else module.weight[..., None]
    return conv(g, x, weight, module.bias, pads, module.stride[0])


def silu(g: GraphBuilder, x: Value) -> Value:
    """Write `x * sigmoid(x)`."""
    return g.op("Mul", x, g.op("Sigmoid", x))


def group_norm(g: GraphBuilder, x: Value, norm: nn.Module, activate: bool = False) -> Value:
    """Write GroupNorm of [B, C, H, W] and optionally SiLU; statistics are float32, the result is as `x`."""
    return normalised(g, x, norm, activate).whole()


def normalised(g: GraphBuilder, x: Value, norm: nn.Module, activate: bool = False) -> LazyValue:
    """Write `group_norm` as a lazy value: scale, shift and SiLU are written for each strip that is read."""
    if isinstance(norm, nn.Identity):
        return LazyValue(g, x, lambda part: silu(g, part) if activate else part)
    assert isinstance(norm, nn.GroupNorm)
    groups, channels = norm.num_groups, norm.num_channels
    spatial = [x.size(axis) for axis in range(2, len(x.shape))]
    elements = channels // groups * math.prod(spatial)
    scale, shift = norm.weight[:, None, None], norm.bias[:, None, None]

    def finish(part: Value) -> Value:
        h = g.cast(g.op("Add", g.op("Mul", part, scale), shift), x.dtype)
        return silu(g, h) if activate else h

    if g.open_sizes:
        return LazyValue(g, open_sizes.instance_norm(g, x, groups, norm.eps), finish)
    flat = g.reshape(g.float32(x), 0, groups, elements)
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    flat = g.op("InstanceNormalization", flat, ones, zeros, epsilon=norm.eps)
    if elements > EXACT_SUM and g.lowering.centre_norms:
        shift = _centred_shift(g, flat, norm, spatial[-1])
    return LazyValue(g, g.reshape(flat, 0, channels, *spatial), finish)


def norm_scale_shift(g: GraphBuilder, x: Value, norm: nn.Module) -> tuple[Value, Value]:
    """Write the float32 scale and shift [B, C] by which a GroupNorm maps each plane of [B, C, H, W]."""
    assert isinstance(norm, nn.GroupNorm)
    groups, channels = norm.num_groups, norm.num_channels
    flat = g.reshape(g.float32(x), 0, groups, channels // groups * x.size(2) * x.size(3))
    mean = g.op("ReduceMean", flat, np.array([2]), keepdims=1)  # [B, groups, 1]
    centred = g.op("Sub", flat, mean)
    variance = g.op("ReduceMean", g.op("Mul", centred, centred), np.array([2]), keepdims=1)
    deviation = g.op("Sqrt", g.op("Add", variance, np.array(norm.eps, np.float32)))
    weight, bias = (p.reshape(groups, channels // groups) for p in (norm.weight, norm.bias))
    scale = g.op("Div", g.constant(weight), deviation)  # [B, groups, channels per group]
    shift = g.op("Sub", g.constant(bias), g.op("Mul", mean, scale))
    return g.reshape(scale, 0, channels), g.reshape(shift, 0, channels)


def _centred_shift(g: GraphBuilder, flat: Value, norm: nn.GroupNorm, row: int) -> Value:
    """Return the shift [B, C, 1, 1] of a GroupNorm, corrected by the mean of `flat` [B, groups, elements].

    ONNX Runtime's normalisation sums a whole group in one go and loses digits of its mean. The mean over rows
    and then over these means does not. For the decoder at 512 px this reduces the error of the image from
    5e-5 to 1e-5.
    """
    groups = norm.num_groups
    rows = g.op("ReduceMean", g.reshape(flat, 0, groups, flat.size(2) // row, row), np.array([3]), keepdims=0)
    mean = g.op("ReduceMean", rows, np.array([2]), keepdims=1)  # [B, groups, 1]
    scale, shift = (g.constant(p.reshape(groups, -1)) for p in (norm.weight, norm.bias))
    return g.reshape(g.op("Sub", shift, g.op("Mul", mean, scale)), 0, norm.num_channels, 1, 1)


def upsample_conv(g: GraphBuilder, x: Value, module: nn.Module) -> Value:
    """Write an upsampling by 2 (nearest neighbor) and a 3x3 convolution, with 4/9 of the multiplications.

    Each of the four output phases reads only 2x2 different inputs, so the taps that meet the same input are
    summed in advance. Zero padding before the upsampling equals zero padding after it.
    """
    assert isinstance(module, nn.Conv2d)
    phases = [
        conv(g, x, weight, module.bias, (1 - a, 1 - b, a, b))
        for (a, b), weight in zip(PHASES, _phase_weights(g, x, module.weight), strict=True)
    ]
    return g.op("DepthToSpace", g.concat(phases, 1), blocksize=2, mode="DCR")


def _phase_weights(g: GraphBuilder, x: Value, weight: Tensor) -> Sequence[Tensor | Value]:
    """Return the 2x2 kernel of each phase, [out, in, 2, 2].

    If the taps are summed in the graph, which a session does once, the file holds 9 taps instead of 16.
    """
    out, channels = weight.shape[:2]
    merge = np.stack([np.kron(MERGE[a], MERGE[b]) for a, b in PHASES]).reshape(4 * len(PHASES), 9)
    taps = weight.permute(2, 3, 0, 1).reshape(9, out * channels)
    shape = (out, channels, 2, 2)
    if not g.lowering.sum_kernels or winograd.chosen(g, shape, x.size(2), x.size(3)):
        kernels = torch.from_numpy(merge).to(taps) @ taps
        return [k.reshape(2, 2, out, channels).permute(2, 3, 0, 1) for k in kernels.split(4, dim=0)]
    kernels = g.op("MatMul", g.constant(merge), taps)
    kernels = g.reshape(kernels, len(PHASES), 2, 2, out, channels)
    kernels = g.reshape(g.op("Transpose", kernels, perm=(0, 3, 4, 1, 2)), len(PHASES) * out, channels, 2, 2)
    return g.split(kernels, 0, [out] * len(PHASES))


def attention(g: GraphBuilder, q: Value, k: Value, v: Value) -> Value:
    """Write attention over [B, channels, tokens] or [B, heads, channels, tokens] with scaled `q`.

    Keys and values may belong to other tokens, and may be the same for the whole batch. Queries are taken a
    few at a time, so that the matrix of scores never exists as a whole; this is exact, because a row of
    scores does not depend on other rows. Softmax is float32.
    """
    tokens, out = q.size(-1), []
    heads = q.size(1) if len(q.shape) == 4 else 1
    chunk = cut(tokens, 4 * heads * k.size(-1), g.lowering.score_bytes)
    swap = [*range(len(q.shape) - 2), len(q.shape) - 1, len(q.shape) - 2]
    for start in range(0, tokens, chunk):
        rows = g.slice(q, len(q.shape) - 1, start, min(start + chunk, tokens))
        scores = g.op("MatMul", g.op("Transpose", rows, perm=swap), k)
        weights = g.cast(g.op("Softmax", g.float32(scores), axis=-1), v.dtype)
        out.append(g.op("MatMul", v, g.op("Transpose", weights, perm=swap)))
    return g.concat(out, len(q.shape) - 1)
