"""Writes the decoder's operators that our kernels compute as nodes at which the graph is cut into parts.

The memory layout of a value at a cut suits its neighbors, and a suffix of its name tells the layout. An
inverted residual stands between convolutions and is channels-last like them; the filter and attention read
planes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from moesr.kernels.plan import SIZES
from moesr.kernels.registry import OPS
from moesr.runtime.engine.partitioned_graph import NHWC, VECTOR
from moesr.training.networks.refinement import AFFFilter

if TYPE_CHECKING:
    from moesr.export.graphs.builder import GraphBuilder, Value
from moesr.export.graphs.kernel_call import KERNEL_TYPES

ARCHITECTURE = 90  # any would do: whether an operator has a plan does not depend on the architecture
FLOPS_PER_BYTE = 184.0
"""Arithmetic that takes an H200 as long as a byte of memory: 790 TFLOP/s and 4.3 TB/s, as measured."""


def possible(op: str, shape: Mapping[str, int], dtype: str) -> bool:
    """Return True if the operator has a plan for this shape."""
    try:
        OPS[op].plan({"batch": 1, "heads": 1, **shape}, dtype, ARCHITECTURE)
    except ValueError:
        return False
    return True


def aff_filter(g: GraphBuilder, x: Value, module: AFFFilter) -> Value | None:
    """The adaptive frequency filter of [B, C, H, W]; None where it must be computed otherwise."""
    weights = {name: getattr(module, name).detach() for name in ("w1", "b1", "w2", "b2")}
    channels, height, width = (x.size(axis) for axis in (1, 2, 3))
    blocks = weights["w1"].shape[1]
    shape = {"channels": channels, "blocks": blocks, "height": height, "width": width, "norm": 0}
    if not (g.lowering.kernels and possible("aff_filter", shape, g.lowering.precision)):
        return None
    return g.kernel("aff_filter", shape, {"x": x}, "y", like=x, weights=weights, scalars={"batch": "B"})


def attention(g: GraphBuilder, q: Value, k: Value, v: Value) -> Value | None:
    """Write attention over [B, channels, tokens], `q` being scaled, as a kernel; None if there is no plan."""
    shape = {"tokens": q.size(2), "width": q.size(1), "tokens_last": 1, "packed": 0}
    if not (g.lowering.kernels and possible("attention", shape, g.lowering.precision)):
        return None
    return g.kernel(
        "attention",
        shape,
        {"q": q, "k": k, "v": v},
        "out",
        like=v,
        scalars={"heads": "B", "tokens": q.size(2), "scale": 1.0},
        options={"scale": 1.0, "tokens_last": True},
    )


def inverted_residual(
    g: GraphBuilder, x: Value, layers: Sequence[tuple[Tensor, Tensor]], same: bool
) -> Value | None:
    """Expand, depthwise 3x3, reduce of [B, C, H, W], plus x where that is the `same` in size.

    `layers` are weight and bias of the three convolutions. None where plans do it in less time, as reckoned,
    or as `Lowering.residuals` says.
    """
    plain = [[tensor.detach() for tensor in layer] for layer in layers]
    (expand, expand_bias), (depthwise, depthwise_bias), (reduce, reduce_bias) = plain
    channels, height, width = (x.size(axis) for axis in (1, 2, 3))
    out, precision = reduce.shape[0], g.lowering.precision
    last = precision in ("fp16", "bf16") and channels % VECTOR == 0 and out % VECTOR == 0
    shape = {"channels": channels, "out": out, "height": height, "width": width, "channels_last": int(last)}
    fits = same == (channels == out) and expand.shape[0] == 4 * channels
    if not (g.lowering.kernels and fits and possible("inverted_residual", shape, precision)):
        return None
    wanted = g.lowering.residuals == "kernels" or (
        g.lowering.residuals == "reckoned" and fused_time_ratio(shape, precision) < 1
    )
    if not wanted:
        return None
    dtype = KERNEL_TYPES[precision]
    weights = {
        "expand": expand.flatten(1).to(dtype),
        "expand_bias": expand_bias,
        "depthwise": depthwise[:, 0].to(dtype),
        "depthwise_bias": depthwise_bias,
        "reduce": reduce.flatten(1).to(dtype),
        "reduce_bias": reduce_bias,
    }
    source = g.named(x, NHWC) if last else x
    like = replace(x, shape=(x.shape[0], out, height, width))
    return g.kernel(
        "inverted_residual",
        shape,
        {"x": source},
        "y",
        like=like,
        suffix=NHWC if last else "",
        weights=weights,
        scalars={"batch": "B"},
    )


def fused_time_ratio(shape: Mapping[str, int], precision: str) -> float:
    """Time of an inverted residual as our kernel over that as a plan's convolutions, both as reckoned.

    Of each convolution, and of the kernel, what takes longer counts: its bytes or its products. Convolutions
    write and read the wide tensor; the kernel never does, but multiplies for its tiles' edges again, and
    leaves the sum after it to another pass.
    """
    channels, out, wide = shape["channels"], shape["out"], 4 * shape["channels"]
    size, kept = SIZES[precision], channels if channels == out else 0
    layers = (
        (channels + wide, channels * wide),
        (2 * wide, 9 * wide),
        (wide + out + kept, wide * out),
    )
    apart = sum(max(size * values, 2 * macs / FLOPS_PER_BYTE) for values, macs in layers)
    plan = OPS["inverted_residual"].plan({"batch": 1, **shape}, precision, ARCHITECTURE)
    constants = plan.launches[0].constants
    rows, columns = int(constants["GH"]), int(constants["GW"])
    edges = rows * columns / ((rows - 2) * (columns - 2))
    macs = edges * wide * (channels + 9) + wide * out
    return max(size * (channels + 3 * out), 2 * macs / FLOPS_PER_BYTE) / apart
