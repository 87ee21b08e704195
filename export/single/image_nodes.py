"""Image operations of the runtime as nodes of a graph: enlarging and color correction.

All values are float32 [1, 3, H, W]. The nodes hold no image size, so they work for every H and W.
"""

from __future__ import annotations

import numpy as np

from moesr.export.graphs.builder import GraphBuilder, Value
from moesr.runtime.images.color import LEVELS, VARIANCE_EPS
from moesr.runtime.images.resize import Convention, passes

CHANNELS = 3
TOP = 255.0
"""The largest level of an image of 8 bits per channel, the depth of the training images."""

REACH = 2  # source pixels that the cubic kernel reads on either side


def scalar(g: GraphBuilder, value: float) -> Value:
    """Add a float32 number."""
    return g.constant(np.array(value, np.float32))


def enlarge(g: GraphBuilder, levels: Value, factor: int, convention: Convention) -> Value:
    """Enlarge levels of 0 to TOP as `imresize` does, rows first.

    With MATLAB's convention every pass is rounded to whole levels, as in the training; with PyTorch's nothing
    is rounded, and only the end result is clipped.
    """
    if factor == 1:
        return levels
    for axis in (2, 3):
        levels = _enlarge_axis(g, levels, axis, factor, convention)
        if convention == "matlab":
            levels = _clipped(g, g.op("Round", levels))
    return levels if convention == "matlab" else _clipped(g, levels)


def _clipped(g: GraphBuilder, levels: Value) -> Value:
    return g.op("Clip", levels, scalar(g, 0.0), scalar(g, TOP))


def _enlarge_axis(g: GraphBuilder, x: Value, axis: int, factor: int, convention: Convention) -> Value:
    """Enlarge one axis by a transposed convolution, whose kernel is the contribution of one source pixel."""
    kernel = cubic_kernel(factor, convention)
    crop = (7 * factor - factor % 2) // 2  # of the result for a source with REACH more pixels per side
    along = [1, 1]
    along[axis - 2] = len(kernel)
    pads, strides = [0, 0, 0, 0], [1, 1]
    pads[axis - 2] = pads[axis] = crop
    strides[axis - 2] = factor
    weight = np.tile(kernel.reshape(1, 1, *along), (CHANNELS, 1, 1, 1)).astype(np.float32)
    return g.op(
        "ConvTranspose",
        _extended(g, x, axis, convention),
        g.constant(weight),
        kernel_shape=along,
        strides=strides,
        pads=pads,
        group=CHANNELS,
    )


def cubic_kernel(factor: int, convention: Convention) -> np.ndarray:
    """Return the weights of one source pixel in the pixels of an image enlarged by a whole factor."""
    size, middle = 9, 4  # of a line whose middle pixel is far from its ends
    taps = passes((size, 1), (size * factor, 1), convention).vertical
    dense = np.zeros((size * factor, size))
    np.add.at(dense, (np.arange(size * factor)[:, None], taps.index), taps.weight)
    first = middle * factor - (3 * factor - factor % 2) // 2
    return dense[first : first + 4 * factor - factor % 2, middle]


def _extended(g: GraphBuilder, x: Value, axis: int, convention: Convention) -> Value:
    """Extend both ends of an axis by REACH pixels: mirrored, or with PyTorch's convention repeated."""
    if convention == "torch":
        pads = np.zeros((2, 4), np.int64)
        pads[:, axis] = REACH
        return g.op("Pad", x, pads.reshape(-1), mode="edge")

    def pixel(start: int, stop: int) -> Value:
        return g.op("Slice", x, *(np.array([i], np.int64) for i in (start, stop, axis)))

    before = [pixel(i, i + 1) for i in reversed(range(REACH))]
    after = [pixel(-i - 1, -i if i else np.iinfo(np.int64).max) for i in range(REACH)]
    return g.op("Concat", *before, x, *after, axis=axis)


def fix_color(g: GraphBuilder, image: Value, lr: Value, method: str) -> Value:
    """Correct an image in [-1, 1] towards the enlarged LR image by a method, one of COLOR_FIXES.

    The level of flat regions is not kept; see `flat_regions` in the runtime for what that means.
    """
    if method == "adain":
        return _adain(g, image, lr)
    return _wavelet(g, image, lr) if method == "wavelet" else image


def _adain(g: GraphBuilder, image: Value, lr: Value) -> Value:
    (mean, deviation), (style_mean, style_deviation) = _statistics(g, image), _statistics(g, lr)
    gain = g.op("Div", style_deviation, deviation)
    return g.op("Add", g.op("Mul", g.op("Sub", image, mean), gain), style_mean)


def _statistics(g: GraphBuilder, image: Value) -> tuple[Value, Value]:
    """Return the mean and the deviation of each channel, [1, 3, 1, 1].

    The runtime's variance is the unbiased one. The factor of n / (n - 1) is left out, as it applies to both
    images and n is tens of thousands of pixels.
    """
    mean = _mean(g, image)
    centred = g.op("Sub", image, mean)
    variance = _mean(g, g.op("Mul", centred, centred))
    return mean, g.op("Sqrt", g.op("Add", variance, scalar(g, VARIANCE_EPS)))


def _mean(g: GraphBuilder, x: Value) -> Value:
    """Return the mean over rows and then over their means, which rounds less than one long sum."""
    for axis in (3, 2):
        x = g.op("ReduceMean", x, np.array([axis], np.int64), keepdims=1)
    return x


def _wavelet(g: GraphBuilder, image: Value, lr: Value) -> Value:
    """`image + low(lr - image)`, where the low band is that of the runtime."""
    line = np.array([1.0, 2.0, 1.0]) / 4.0
    kernel = np.tile(np.outer(line, line)[None, None], (CHANNELS, 1, 1, 1)).astype(np.float32)
    low = g.op("Sub", lr, image)
    for level in range(LEVELS):
        reach = 2**level
        padded = g.op("Pad", low, np.array([0, 0, reach, reach] * 2, np.int64), mode="edge")
        low = g.op(
            "Conv", padded, g.constant(kernel), kernel_shape=[3, 3], dilations=[reach] * 2, group=CHANNELS
        )
    return g.op("Add", image, low)
