"""int8 graphs: convolutions and products by weights in 8-bit integers, everything else in float32.

Inputs and outputs of a layer are rounded by ranges observed on recorded inputs, and weights by the largest
value of each output channel. QuantizeLinear and DequantizeLinear stand around the node, and backends fuse
them. Only a layer's own inputs are rounded; a residual that bypasses the layer stays float32.

The error that each layer alone causes in the result is measured. The errors of several layers add up like
independent noise, as the root of the sum of squares. Layers with the most squared error per
multiply-accumulate are left in float32, until the error of the rest is within `Lowering.int8_error`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from moesr.export.graphs.builder import BuiltGraph
from moesr.export.lowering import Lowering
from moesr.export.quantisation.calibration import Inputs, Recording, spread
from moesr.export.quantisation.qdq import SWITCHES, Layer, Range, Ranges, layers_of, quantised, switched
from moesr.runtime.backends.ort import session_options
from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.engine.graph_spec import Calibration
from moesr.runtime.system.relative_error import relative_l2

PERCENTILE = 99.999
"""The percentile of a tensor's values at which its range ends on either side; values beyond are clipped."""

METHOD = f"percentile {PERCENTILE:g}"

SMALL_PX, SMALL_DECODER_PX = 32, 16
"""Sides, in latent pixels, of the small graphs in which layers are tried one by one."""

TRIALS = 16  # the most runs of a small graph per layer

SAMPLES = 4096  # values kept per tensor and run
Make = Callable[[int, Lowering], BuiltGraph]
"""Makes a graph for latents of a given side."""


def int8_graph(make: Make, role: str, latent_px: int, recording: Recording, lowering: Lowering) -> BuiltGraph:
    """Make a graph with those layers in int8 that cost little accuracy on the recorded inputs."""
    built, inputs = make(latent_px, lowering), recording.calibrating(role)
    layers = layers_of(built)
    ranges = observe(built, layers, inputs)
    kept = set[int]()
    if lowering.int8_error < 1:  # an error of 1 is the whole result
        side = min(latent_px, SMALL_DECODER_PX if role == DECODER else SMALL_PX)
        small = make(side, lowering)
        trials = [middle(given, side, latent_px) for given in spread(inputs, TRIALS)]
        errors = sensitivities(small, layers_of(small), ranges, trials)
        kept = to_keep(errors, [layer.macs for layer in layers], lowering.int8_error)
    share = sum(layer.macs for i, layer in enumerate(layers) if i not in kept) / built.macs
    names = tuple(layers[i].name for i in sorted(kept))
    found = Calibration(recording.images - 1, recording.steps, len(inputs), METHOD, share, names)
    return replace(quantised(built, layers, ranges, kept), calibration=found)


def middle(inputs: Inputs, side: int, latent_px: int) -> Inputs:
    """Cut a graph's inputs to the middle, for latents of `side` pixels instead of `latent_px`."""

    def cut(array: np.ndarray) -> np.ndarray:
        start = (latent_px - side) // 2 * array.shape[2] // latent_px
        stop = start + side * array.shape[2] // latent_px
        return np.ascontiguousarray(array[:, :, start:stop, start:stop])

    return {name: cut(array) if array.ndim == 4 else array for name, array in inputs.items()}


def observe(
    built: BuiltGraph, layers: Sequence[Layer], inputs: Sequence[Inputs], percentile: float = PERCENTILE
) -> Ranges:
    """Return the ranges of every layer's input and output over runs of the float32 graph.

    Only SAMPLES values per tensor and run are kept, so that memory stays small.
    """
    model = onnx.ModelProto()
    model.CopyFrom(built.model)
    tensors = {
        tensor for layer in layers for node in layer.nodes for tensor in (node.input[0], node.output[0])
    }
    # ONNX Runtime orders nodes from the last one backwards. With the sampling nodes in reverse order, each
    # tensor is sampled before later ones are computed, and its memory is freed.
    places = {output: i for i, node in enumerate(model.graph.node) for output in node.output}
    names = sorted(tensors, key=lambda name: (-places.get(name, -1), name))
    for i, name in enumerate(names):
        model.graph.node.extend(_sampling(f"sample_{i}", name, built.values[name].shape))
        model.graph.output.append(helper.make_tensor_value_info(f"sample_{i}", TensorProto.FLOAT, [None]))
    session, values = open_model(model), {name: [] for name in names}
    for given in inputs:
        for name, sample in zip(
            names, session.run([f"sample_{i}" for i in range(len(names))], given), strict=True
        ):
            values[name].append(sample)

    def over(tensors: Sequence[str]) -> Range:
        seen = np.concatenate([sample for name in tensors for sample in values[name]])
        low, high = np.percentile(seen, (100 - percentile, percentile))
        return min(float(low), 0.0), max(float(high), 0.0)

    return [
        (over([n.input[0] for n in layer.nodes]), over([n.output[0] for n in layer.nodes]))
        for layer in layers
    ]


def sensitivities(
    built: BuiltGraph, layers: Sequence[Layer], ranges: Ranges, inputs: Sequence[Inputs]
) -> list[float]:
    """Return, for each layer, the relative L2 error of the result if this layer alone is int8.

    One session serves all layers: its graph holds every layer in both forms, and an input selects one.
    """
    session = open_model(switched(built, layers, ranges))
    count = len(layers)

    def results(switches: np.ndarray) -> np.ndarray:
        fed = switches.astype(np.float32)
        runs = [np.asarray(session.run(None, {**given, SWITCHES: fed})[0]) for given in inputs]
        return np.stack(runs).astype(np.float64)

    want = results(np.zeros(count))
    return [relative_l2(results(row), want) for row in np.eye(count)]


def to_keep(errors: Sequence[float], macs: Sequence[int], budget: float) -> set[int]:
    """Return the indices of the layers to leave in float32 for an error of the others within a budget."""
    squares, kept = np.square(errors), set[int]()
    for i in sorted(range(len(macs)), key=lambda i: -squares[i] / macs[i]):
        if sum(square for j, square in enumerate(squares) if j not in kept) <= budget**2:
            break
        kept.add(i)
    return kept


def _sampling(output: str, source: str, shape: Sequence[int | str]) -> list[NodeProto]:
    """Return nodes that take about SAMPLES values of a tensor from all of its rows and columns."""
    sizes = [size for size in shape if isinstance(size, int)]
    stride = max(1, math.prod(sizes) // SAMPLES)
    while math.gcd(stride, math.prod(sizes)) > 1:
        stride += 1

    def vector(name: str, value: int) -> NodeProto:
        return helper.make_node("Constant", [], [f"{output}_{name}"], value_ints=[value])

    parts = {"flat": -1, "start": 0, "end": np.iinfo(np.int64).max, "axis": 0, "stride": stride}
    return [
        *(vector(name, value) for name, value in parts.items()),
        helper.make_node("Reshape", [source, f"{output}_flat"], [f"{output}_values"]),
        helper.make_node(
            "Slice",
            [f"{output}_values", *(f"{output}_{n}" for n in ("start", "end", "axis", "stride"))],
            [output],
        ),
    ]


def open_model(model: onnx.ModelProto) -> ort.InferenceSession:
    """Open a session on a graph in memory."""
    return ort.InferenceSession(model.SerializeToString(), session_options(), ["CPUExecutionProvider"])
