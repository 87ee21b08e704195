"""The refinement network of the decoder: AFF blocks whose large inner tensors are computed in strips.

The inverted residual has four times as many channels inside, at full image size, and the filter holds a
complex spectrum. For a CPU the first is cut by rows and the second by channel blocks. The strips stay in the
cache, and each reuses the memory of the one before.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moesr.export.graphs import kernel_nodes, open_sizes
from moesr.export.graphs.builder import GraphBuilder, Value
from moesr.export.graphs.layers import conv, conv_module, group_norm, normalised
from moesr.export.graphs.strips import LazyValue, pending
from moesr.export.lowering import cut
from moesr.kernels.aff_filter import portable
from moesr.training.networks.refinement import (
    SLOPE,
    AFFBlock,
    AFFFilter,
    ConvNorm,
    InvertedResidual,
    RefinementUNet,
)

make_plan = functools.cache(portable.make_plan)


def refine(g: GraphBuilder, x: Value, network: RefinementUNet) -> Value:
    """Write the refinement network, [B, C, H, W] -> [B, C, H, W]."""

    def block(name: str, value: Value) -> Value:
        with g.scope(name):
            module = network.get_submodule(name)
            assert isinstance(module, AFFBlock)
            return _block(g, value, module)

    def up(name: str, value: Value) -> Value:
        with g.scope(name):
            wide = conv_module(g, value, network.get_submodule(f"{name}.0"))
            return g.op("DepthToSpace", wide, blocksize=2, mode="CRD")

    def pool(value: Value) -> Value:
        return g.op("MaxPool", value, kernel_shape=[2, 2], strides=[2, 2])

    full = block("conv1", x)
    half = block("conv2", pool(full))
    quarter = block("conv3", pool(half))
    for i in range(len(network.context_refine)):
        quarter = block(f"context_refine.{i}", quarter)
    half = block("up_conv3", g.concat([half, up("up3", quarter)], 1))
    return block("up_conv2", g.concat([full, up("up2", half)], 1))


def _block(g: GraphBuilder, x: Value, block: AFFBlock) -> Value:
    h = _inverted_residual(g, x, normalised(g, x, block.norm1), block)
    with g.scope("filter"):
        if isinstance(block.filter, AFFFilter):
            filtered = kernel_nodes.normed_filter(g, h, block.norm2, block.filter)
            if filtered is not None:
                return filtered
        normed = group_norm(g, h, block.norm2)
        return g.op(
            "Add", h, _filter(g, normed, block.filter) if isinstance(block.filter, AFFFilter) else normed
        )


def _inverted_residual(g: GraphBuilder, x: Value, normed: LazyValue, block: AFFBlock) -> Value:
    """`mlp(normed) + up_dim(x)`, by our kernel or in strips of rows with a halo of one row."""
    mlp, height, width = block.mlp, x.size(2), x.size(3)
    layers = _folded(mlp)
    if g.lowering.kernels:
        whole = normed.whole()
        if (fused := kernel_nodes.inverted_residual(g, whole, layers, mlp.residual)) is not None:
            return g.op("Add", conv_module(g, x, block.up_dim), fused)
        normed = pending(g, whole)
    (w_expand, b_expand), (w_depth, b_depth), (w_reduce, b_reduce) = layers
    inner = w_expand.shape[0]
    rows = cut(height, inner * width * 4, g.lowering.strip_bytes)
    strips = []
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        # the zero padding surrounds the activation, not its input
        top, bottom = int(start == 0), int(stop == height)
        read = normed.rows(start - 1 + top, stop + 1 - bottom)
        h = g.op("LeakyRelu", conv(g, read, w_expand, b_expand), alpha=SLOPE)
        h = g.op("LeakyRelu", conv(g, h, w_depth, b_depth, (top, 1, bottom, 1), groups=inner), alpha=SLOPE)
        h = conv(g, h, w_reduce, b_reduce)
        if mlp.residual:
            h = g.op("Add", h, g.slice(read, 2, 1 - top, 1 - top + stop - start))
        strips.append(g.op("Add", conv_module(g, g.slice(x, 2, start, stop), block.up_dim), h))
    return g.concat(strips, 2)


def _folded(mlp: InvertedResidual) -> list[tuple[Tensor, Tensor]]:
    """Return the weights and biases of the three convolutions, with their BatchNorms folded in."""
    pairs = []
    for layer in mlp.block:
        assert isinstance(layer, ConvNorm)
        convolution, norm = layer.block.conv, layer.block.norm
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        weight = convolution.weight.double() * scale[:, None, None, None]
        pairs.append((weight.float(), (norm.bias.double() - norm.running_mean.double() * scale).float()))
    return pairs


def _filter(g: GraphBuilder, x: Value, module: AFFFilter) -> Value:
    """Write the adaptive frequency filter as float32 matrix products, in strips of channel blocks."""
    if g.open_sizes:
        return g.cast(open_sizes.aff_filter(g, x, module), x.dtype)
    w1, b1, w2, b2 = (w.detach().numpy() for w in (module.w1, module.b1, module.w2, module.b2))
    blocks, size = w1.shape[1], w1.shape[2]
    height, width = x.size(2), x.size(3)
    plan, step = make_plan(height, width), cut(blocks, size * height * width * 4, g.lowering.strip_bytes)
    starts = range(0, blocks, step)
    counts = [min(step, blocks - start) for start in starts]
    strips = []
    for start, part, n in zip(starts, g.split(x, 1, [n * size for n in counts]), counts, strict=True):
        mine = slice(start, start + n)
        weights = w1[:, mine], b1[:, mine], w2[:, mine], b2[:, mine]
        strips.append(g.cast(portable.aff_filter(plan, g.float32(part), weights, onnx_ops(g)), x.dtype))
    return g.concat(strips, 1)


def onnx_ops(g: GraphBuilder) -> portable.TensorOps:
    """Return the operations of the portable filter as nodes of a graph."""
    return _OnnxOps(g)


class _OnnxOps:
    def __init__(self, g: GraphBuilder) -> None:
        self.g = g

    def shape(self, x: Value) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else 0 for d in x.shape)

    def reshape(self, x: Value, *shape: int) -> Value:
        return self.g.reshape(x, *shape)

    def transpose(self, x: Value, *order: int) -> Value:
        return self.g.op("Transpose", x, perm=order)

    def split(self, x: Value, axis: int, *sizes: int) -> list[Value]:
        return self.g.split(x, axis, sizes)

    def concat(self, parts: list[Value], axis: int) -> Value:
        return self.g.concat(parts, axis)

    def sum(self, x: Value, axis: int) -> Value:
        return self.g.op("ReduceSum", x, np.array([axis]), keepdims=0)

    def matmul(self, a: Any, b: Any) -> Value:
        exact = [m if isinstance(m, Value) else self.g.constant(m) for m in (a, b)]
        return self.g.op("MatMul", *exact)

    def add(self, a: Value, b: Value) -> Value:
        return self.g.op("Add", a, b)

    def sub(self, a: Value, b: Value) -> Value:
        return self.g.op("Sub", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self.g.op("Mul", a, b)

    def pointwise(self, x: Value, weight: np.ndarray, bias: np.ndarray, groups: int) -> Value:
        return conv(
            self.g, x, torch.from_numpy(weight)[..., None, None], torch.from_numpy(bias), groups=groups
        )

    def leaky_relu(self, x: Value, slope: float) -> Value:
        return self.g.op("LeakyRelu", x, alpha=slope)

    def soft_shrink(self, x: Value, threshold: float) -> Value:
        bounds = np.array(-threshold, np.float32), np.array(threshold, np.float32)
        return self.g.op("Sub", x, self.g.op("Clip", x, *bounds))
