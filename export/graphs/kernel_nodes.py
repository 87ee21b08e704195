"""Writes the decoder's operators that our kernels compute as nodes at which the graph is cut into parts.

The memory layout of a value at a cut suits its neighbors, and a suffix of its name tells the layout. An
inverted residual stands between convolutions and is channels-last like them; the filter and attention read
planes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from moesr.export.graphs.layers import norm_scale_shift
from moesr.kernels.plan import SIZES
from moesr.kernels.registry import OPS
from moesr.runtime.engine.partitioned_graph import NHWC, VECTOR
from moesr.training.networks.refinement import AFFFilter

if TYPE_CHECKING:
    from moesr.export.graphs.builder import GraphBuilder, Value
from moesr.export.graphs.kernel_call import KERNEL_TYPES

ARCHITECTURE = 90  # any value works, since plans exist for the same shapes on every architecture
FLOPS_PER_BYTE = 184.0
"""Arithmetic that takes as long as a byte of memory on an H200: 790 TFLOP/s and 4.3 TB/s, as measured."""

INSTRUCTION_BYTES = 5.1
"""Bytes that an H200 moves while it issues one warp instruction.

This is 4.3 TB/s over 132 multiprocessors, four instructions per clock and an assumed clock of 1.6 GHz.
"""

CHUNK_INSTRUCTIONS, VALUE_INSTRUCTIONS = 200.0, 0.12
"""Warp instructions of the inverted residual per chunk of wide channels, fitted to its assembly on sm_90.

The loop over chunks has 690, 441 and 321 instructions for 128 pixels x 32 channels, 128 x 16 and 64 x 16.
"""


def possible(op: str, shape: Mapping[str, int], dtype: str) -> bool:
    """Return True if the operator has a plan for this shape."""
    try:
        OPS[op].plan({"batch": 1, "heads": 1, **shape}, dtype, ARCHITECTURE)
    except ValueError:
        return False
    return True


def normed_filter(g: GraphBuilder, x: Value, norm: nn.Module, module: AFFFilter) -> Value | None:
    """Write `x + filter(norm(x))` of [B, C, H, W] as one kernel; None if there is no plan for it.

    The graph computes only the scale and the shift of each plane, which the kernel applies as it loads x.
    """
    weights = {name: getattr(module, name).detach() for name in ("w1", "b1", "w2", "b2")}
    channels, height, width = (x.size(axis) for axis in (1, 2, 3))
    blocks = weights["w1"].shape[1]
    shape = {"channels": channels, "blocks": blocks, "height": height, "width": width, "norm": 1}
    if not (g.lowering.kernels and possible("aff_filter", shape, g.lowering.precision)):
        return None
    scale, shift = norm_scale_shift(g, x, norm)
    inputs = {"x": x, "scale": scale, "shift": shift}
    return g.kernel("aff_filter", shape, inputs, "y", like=x, weights=weights, scalars={"batch": "B"})


def attention(g: GraphBuilder, q: Value, k: Value, v: Value) -> Value | None:
    """Write attention over [B, channels, tokens], with scaled `q`, as a kernel; None if there is no plan."""
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
    """Write an inverted residual of [B, C, H, W] as a kernel; x is added if it has the `same` size.

    `layers` are the weights and biases of the three convolutions. The result is None if there is no plan for
    the kernel, or if `Lowering.residuals` leaves the layer to TensorRT's plans.
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
        g.lowering.residuals == "estimated" and fused_time_ratio(shape, precision) < 1
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
    """Estimate the time of an inverted residual as our kernel over its time as three convolutions.

    The time of a convolution is that of its bytes or of its products, whichever is longer. For the kernel the
    rate of issuing instructions is a third bound, and in practice the one that decides. Convolutions write
    and read the wide tensor. The kernel does not, but it computes the edges of its tiles again and leaves the
    sum after it to another pass.
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
    grid, chunk, warps = rows * columns, int(constants["CHUNK"]), plan.launches[0].num_warps
    loop = warps * (CHUNK_INSTRUCTIONS + VALUE_INSTRUCTIONS * grid * chunk)  # of one chunk of a tile
    issued = edges / grid * loop * wide / chunk * INSTRUCTION_BYTES  # bytes per output pixel
    return max(size * (channels + 3 * out), 2 * macs / FLOPS_PER_BYTE, issued) / apart
