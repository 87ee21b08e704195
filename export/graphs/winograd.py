"""Winograd's minimal filtering (Lavin and Gray, 2015) by graph operators, since CPU libraries lack it.

A tile of m x m outputs of an r x r convolution takes (m + r - 1)^2 products per channel pair instead of m^2
r^2: for m = 4 and r = 3, 36 instead of 144. The tiles of all channels form (m + r - 1)^2 matrix products,
which run at the speed of a CPU's matrix product. The transforms around them are small convolutions and
products with constants:

    V = B^T d B   input tiles      U = G w G^T   kernels      y = A^T (sum over channels of U V) A

The transform of the kernels is part of the graph, so the file holds the plain weights and a session folds the
transform into constants once. This is for float32 only: the transforms lose about two bits, too many for half
precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial, reduce

import numpy as np
from torch import Tensor

from moesr.export.graphs.builder import GraphBuilder, Value
from moesr.export.graphs.strips import LazyValue, pending

TILE = 4  # m
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0)  # the first m + r - 2 of them, and infinity

# Nanoseconds measured on one core of an AVX2 machine: per multiply-accumulate, and per transformed element
DIRECT_NS, PRODUCT_NS, INPUT_NS, OUTPUT_NS = 0.022, 0.026, 5.1, 3.5


@cache
def matrices(kernel: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (A^T, G, B^T) of one dimension for TILE outputs: Toom-Cook at POINTS and infinity."""
    size = TILE + kernel - 1
    points = np.array(POINTS[: size - 1])
    a_t = np.vander(points, TILE, increasing=True).T
    g = np.vander(points, kernel, increasing=True)
    b_t = np.zeros((size, size))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        g[i] /= np.prod(point - others)
        b_t[i, :-1] = np.poly(others)[::-1]  # coefficients, lowest power first
    b_t[-1] = np.poly(points)[::-1]
    at_infinity = np.eye(TILE)[:, -1:], np.eye(kernel)[-1:]
    return np.hstack([a_t, at_infinity[0]]), np.vstack([g, at_infinity[1]]), b_t


def pays(channels_in: int, channels_out: int, kernel: int, height: int, width: int) -> bool:
    """Return True if Winograd is clearly faster for outputs of this size, by a model fitted to timings."""
    if kernel not in (2, 3) or height % TILE or width % TILE or height * width < 64 * TILE**2:
        return False
    size = TILE + kernel - 1
    pairs, growth = channels_in * channels_out, (size / TILE) ** 2
    direct = DIRECT_NS * pairs * kernel**2
    tiled = PRODUCT_NS * pairs * growth + (INPUT_NS * channels_in + OUTPUT_NS * channels_out) * growth / 2.25
    return tiled < 0.8 * direct


def chosen(g: GraphBuilder, shape: Sequence[int], height: int, width: int) -> bool:
    """Return True if the lowering uses Winograd for a convolution with the kernel shape [out, in, r, r]."""
    return g.lowering.winograd and pays(shape[1], shape[0], shape[2], height, width)


def transform_input(g: GraphBuilder, x: Value | LazyValue, kernel: int, pads: Sequence[int]) -> list[Value]:
    """Write the tiles V of `x` padded by (top, left, bottom, right).

    They come in strips of rows, each [B, (m + r - 1)^2, C, tiles].
    """
    x = pending(g, x)
    channels, height, width = (x.size(axis) for axis in (1, 2, 3))
    top, left, bottom, right = pads
    size = TILE + kernel - 1
    out_height, columns = height + top + bottom - kernel + 1, (width + left + right - kernel + 1) // TILE
    _, _, b_t = matrices(kernel)
    filters = g.constant(np.einsum("ai,bj->abij", b_t, b_t).reshape(size * size, 1, size, size))
    rows, strips = max(1, g.lowering.strip_tiles // columns) * TILE, []
    for start in range(0, out_height, rows):
        stop = min(start + rows, out_height)
        # rows of x including the halo; outside x there are zeros
        first, last = start - top, stop - top + kernel - 1
        part = x.rows(max(first, 0), min(last, height))
        planes = g.reshape(part, -1, 1, part.size(2), width)
        v = g.op(
            "Conv",
            planes,
            filters,
            kernel_shape=[size, size],
            strides=[TILE, TILE],
            pads=[max(-first, 0), left, max(last - height, 0), right],
        )
        tiles = (stop - start) // TILE * columns
        v = g.reshape(v, -1, channels, size * size, tiles)
        strips.append(g.op("Transpose", v, perm=(0, 2, 1, 3)))
    return strips


def multiply(
    g: GraphBuilder, parts: Sequence[Sequence[Value]], weight: Tensor, bias: Tensor | None, width: int
) -> Value:
    """Write the convolution of transformed inputs with `weight` [out, in, r, r], to [B, out, H, `width`].

    `parts` are transformed inputs whose channels follow one another in `weight`. There may be several, since
    other convolutions may read some of them too. Their products are added, because concatenating the inputs
    would copy large tensors.
    """
    out, size = weight.shape[0], TILE + weight.shape[2] - 1
    kernels = [_transform_kernel(g, w) for w in weight.split([part[0].size(2) for part in parts], dim=1)]
    a_t, _, _ = matrices(weight.shape[2])
    inverse, columns, rows = g.constant(np.kron(a_t, a_t)), width // TILE, []
    for strips in zip(*parts, strict=True):
        products = [g.op("MatMul", u, v) for u, v in zip(kernels, strips, strict=True)]
        tiles = products[0].size(3)
        total = g.reshape(reduce(partial(g.op, "Add"), products), 0, size * size, out * tiles)
        y = g.reshape(g.op("MatMul", inverse, total), 0, TILE**2 * out, tiles // columns, columns)
        y = y if bias is None else g.op("Add", y, bias.repeat(TILE**2)[:, None, None])
        rows.append(g.op("DepthToSpace", y, blocksize=TILE, mode="DCR"))
    return g.concat(rows, 2)


def _transform_kernel(g: GraphBuilder, weight: Tensor) -> Value:
    """Transform a kernel [out, in, r, r] to U [(m + r - 1)^2, out, in] in the graph."""
    out, channels, kernel, _ = weight.shape
    _, kernel_g, _ = matrices(kernel)
    taps = weight.permute(2, 3, 0, 1).reshape(kernel**2, out * channels)
    u = g.op("MatMul", g.constant(np.kron(kernel_g, kernel_g)), taps)
    return g.reshape(u, (TILE + kernel - 1) ** 2, out, channels)
