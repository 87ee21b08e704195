"""Forms of layers that hold no image size, for graphs whose height and width are open.

The builder still believes in one nominal size, which gives every value's shape, but the nodes written here
work for any: a Reshape copies the width (0) and infers the height (-1), attention keeps the queries in rows
and columns, and the DFT matrices of the frequency filter are computed in the graph. All values are
[1, C, H, W]. Attention is not cut into chunks and the DFT is not factored, so the fixed forms are faster.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto
from torch import Tensor, nn

from moesr.export.graphs.builder import GraphBuilder, Value, Weight
from moesr.kernels.aff_filter.reference import SHRINK, SLOPE
from moesr.training.networks.refinement import AFFFilter


def fold(g: GraphBuilder, x: Value, *leading: int) -> Value:
    """Reshape [1, C, H, W] to `leading` sizes, an inferred one, and the width."""
    return g.op("Reshape", x, np.array([*leading, -1, 0], np.int64))


def instance_norm(g: GraphBuilder, x: Value, groups: int, eps: float) -> Value:
    """Normalise groups of channels to mean 0 and deviation 1, in float32."""
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    flat = g.op("InstanceNormalization", fold(g, g.float32(x), 0, groups), ones, zeros, epsilon=eps)
    return fold(g, flat, 0, x.size(1))


def attention(g: GraphBuilder, q: Value, k: Value, v: Value, heads: int) -> Value:
    """Write attention over all positions with scaled `q`; like the arguments, the result is [1, C, H, W]."""
    channels = q.size(1)
    width = channels // heads
    rows = g.op("Transpose", fold(g, q, heads, width), perm=(0, 2, 3, 1))  # [heads, H, W, width]
    k, v = (g.op("Reshape", x, np.array([heads, 1, width, -1], np.int64)) for x in (k, v))
    scores = g.op("MatMul", rows, k)  # [heads, H, W, H*W]
    weights = g.cast(g.op("Softmax", g.float32(scores), axis=-1), v.dtype)
    out = g.op("MatMul", weights, g.op("Transpose", v, perm=(0, 1, 3, 2)))
    return fold(g, g.op("Transpose", out, perm=(0, 3, 1, 2)), 1, channels)


def nearest_codes(g: GraphBuilder, z: Value, products: Value, squares: Value, table: Tensor) -> Value:
    """Replace every latent by the row of `table` of its nearest code.

    The squared distance to a code, without a part that all codes share, is the latent times a column of
    `products` plus an entry of `squares`.
    """
    points = g.op("Transpose", z, perm=(0, 2, 3, 1))
    distance = g.op("Add", g.op("MatMul", points, products), squares)
    index = g.op("ArgMin", distance, axis=3, keepdims=0)
    return g.op("Transpose", g.op("Gather", table, index), perm=(0, 3, 1, 2))


def cover(g: GraphBuilder, pattern: np.ndarray, like: Value) -> Value:
    """Repeat a constant [1, C, n, n] over the height and width of `like`, and crop it."""
    side = pattern.shape[-1]
    sizes = g.op("Shape", like, start=2, end=4)
    counts = g.op("Div", g.op("Add", sizes, _whole(side - 1)), _whole(side))
    repeats = g.op("Concat", np.array([1, 1], np.int64), counts, axis=0)
    shape = (*pattern.shape[:2], *like.shape[2:])
    repeated = _shaped(g.op("Tile", g.constant(pattern), repeats), shape)
    cropped = g.op("Slice", repeated, np.zeros(2, np.int64), sizes, np.array([2, 3], np.int64))
    return _shaped(cropped, shape)


def _shaped(value: Value, shape: Any) -> Value:
    """Return a value with its nominal shape, which inference does not know."""
    return replace(value, shape=tuple(shape))


def _whole(value: int) -> np.ndarray:
    return np.array([value], np.int64)


def aff_filter(g: GraphBuilder, x: Value, module: AFFFilter) -> Value:
    """Write the adaptive frequency filter with dense DFT matrices, in float32."""
    channels, height, width = (x.size(axis) for axis in (1, 2, 3))
    x = g.float32(x)
    rows, half = _positions(g, x, 2, height), _positions(g, x, 3, width)
    across, back = _row_matrices(g, half, _half_frequencies(g, half, width))
    down = _column_matrix(g, rows)
    spectrum = g.op("Concat", *(g.op("MatMul", x, part) for part in across), axis=2)
    spectrum = g.op("MatMul", down, spectrum)  # [1, C, 2H, U], real rows over imaginary ones
    real, imag = g.ops("Split", 2, spectrum, axis=2, num_outputs=2)
    a, b = _complex_layer(g, real, imag, module.w1, module.b1, channels)
    a, b = (g.op("LeakyRelu", part, alpha=SLOPE) for part in (a, b))
    a, b = _complex_layer(g, a, b, module.w2, module.b2, channels)
    a, b = _soft_shrink(g, a), _soft_shrink(g, b)
    product = (
        g.op("Sub", g.op("Mul", real, a), g.op("Mul", imag, b)),
        g.op("Add", g.op("Mul", real, b), g.op("Mul", imag, a)),
    )
    inverse = g.op("MatMul", g.op("Transpose", down, perm=(1, 0)), g.op("Concat", *product, axis=2))
    real, imag = g.ops("Split", 2, inverse, axis=2, num_outputs=2)
    filtered = g.op("Add", g.op("MatMul", real, back[0]), g.op("MatMul", imag, back[1]))
    return g.op("Add", filtered, x)


def _positions(g: GraphBuilder, x: Value, axis: int, size: int) -> Value:
    """Return 0, 1, .. up to the length of an axis: float32 [n]."""
    stop = g.op("Squeeze", g.op("Shape", x, start=axis, end=axis + 1), _whole(0))
    found = g.op("Range", np.array(0, np.int64), stop, np.array(1, np.int64))
    return g.cast(_shaped(found, (size,)), TensorProto.FLOAT)


def _half_frequencies(g: GraphBuilder, positions: Value, width: int) -> Value:
    """Return 0, 1, .. W/2 from the positions of a row of even length: float32 [W/2 + 1]."""
    stop = g.op("Add", g.op("Div", g.op("Shape", positions), _whole(2)), _whole(1))
    sliced = g.op("Slice", positions, _whole(0), stop, _whole(0))
    return _shaped(sliced, (width // 2 + 1,))


def _angles(g: GraphBuilder, positions: Value, frequencies: Value) -> tuple[Value, Value]:
    """Return cosines and sines of `2 pi position frequency / n`, over sqrt(n): [positions, frequencies] each.

    The product is reduced by whole turns before the division, which float32 does exactly for whole numbers.
    """
    count = g.cast(g.op("Shape", positions), TensorProto.FLOAT)  # [1]
    product = g.op("Mul", g.op("Unsqueeze", positions, _whole(1)), g.op("Unsqueeze", frequencies, _whole(0)))
    turns = g.op("Floor", g.op("Div", product, count))
    rest = g.op("Sub", product, g.op("Mul", turns, count))
    angle = g.op("Mul", g.op("Div", rest, count), np.array(2 * math.pi, np.float32))
    root = g.op("Sqrt", count)
    return g.op("Div", g.op("Cos", angle), root), g.op("Div", g.op("Sin", angle), root)


def _row_matrices(g: GraphBuilder, positions: Value, frequencies: Value) -> tuple[list[Value], list[Value]]:
    """Return the real and imaginary matrices of a real DFT along rows, and those of its inverse."""
    cosines, sines = _angles(g, positions, frequencies)
    parts = [cosines, g.op("Neg", sines)]
    count = g.cast(g.op("Shape", positions), TensorProto.FLOAT)
    # every frequency but the first and the last one also stands for its mirror image
    doubled = g.op("Mul", frequencies, np.array(2.0, np.float32))
    inner = g.op("Mul", frequencies, g.op("Sub", count, doubled))  # 0 at both ends, positive between
    weight = g.op("Add", g.op("Clip", inner, *_bounds(0.0, 1.0)), np.array(1.0, np.float32))
    return parts, [g.op("Transpose", g.op("Mul", part, weight), perm=(1, 0)) for part in parts]


def _column_matrix(g: GraphBuilder, positions: Value) -> Value:
    """Return the matrix of the DFT along columns for stacked real and imaginary parts, [2H, 2H]."""
    cosines, sines = _angles(g, positions, positions)
    upper = g.op("Concat", cosines, sines, axis=1)
    lower = g.op("Concat", g.op("Neg", sines), cosines, axis=1)
    return g.op("Concat", upper, lower, axis=0)


def _complex_layer(
    g: GraphBuilder, real: Value, imag: Value, weight: nn.Parameter, bias: nn.Parameter, channels: int
) -> tuple[Value, Value]:
    """Write a complex block-diagonal layer over the channels; `weight` is [2, blocks, in, out]."""
    blocks = weight.shape[1]
    matrices = [w.transpose(1, 2).reshape(channels, -1)[..., None, None] for w in weight.detach()]
    biases = [b.reshape(-1) for b in bias.detach()]

    def layer(x: Value, matrix: Weight, offset: Weight | None = None) -> Value:
        return g.op("Conv", x, matrix, offset, kernel_shape=[1, 1], group=blocks)

    return (
        g.op("Sub", layer(real, matrices[0], biases[0]), layer(imag, matrices[1])),
        g.op("Add", layer(imag, matrices[0], biases[1]), layer(real, matrices[1])),
    )


def _soft_shrink(g: GraphBuilder, x: Value) -> Value:
    return g.op("Sub", x, g.op("Clip", x, *_bounds(-SHRINK, SHRINK)))


def _bounds(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    return np.array(low, np.float32), np.array(high, np.float32)
