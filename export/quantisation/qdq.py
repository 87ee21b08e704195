"""Writes layers of a graph in int8: QuantizeLinear and DequantizeLinear around a node, which backends fuse.

Inputs and results are unsigned 8-bit integers with one scale and zero point. Weights are signed 8-bit
integers with a scale per output channel, and biases are signed 32-bit integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from moesr.export.graphs.builder import BuiltGraph, macs_of

FLOAT32_SCOPES = frozenset({"time_embed", "quantize", "filter"})
"""Parts of a graph that always stay float32: they are too small to gain, select codes, or hold a spectrum."""

SWITCHES = "int8"  # name of the input that switches layers one by one


@dataclass(frozen=True)
class Layer:
    """A weight and the nodes that multiply by it; there are several if a tensor is cut into strips."""

    name: str  # name of the first node
    nodes: tuple[NodeProto, ...]
    weight: np.ndarray
    bias: np.ndarray | None
    macs: int

    @property
    def axis(self) -> int:
        """The weight's axis of output channels."""
        return 0 if self.nodes[0].op_type == "Conv" else self.weight.ndim - 1


Range = tuple[float, float]
Ranges = Sequence[tuple[Range, Range]]
"""The ranges of each layer's input and output."""


def layers_of(built: BuiltGraph) -> list[Layer]:
    """Return the layers that could be int8, in order: convolutions and products by a constant.

    They are the same for every tile size.
    """
    constants = {tensor.name: tensor for tensor in built.model.graph.initializer}

    def cost(node: NodeProto) -> int:
        given = [built.values[node.input[0]].shape, tuple(constants[node.input[1]].dims)]
        return macs_of(node.op_type, given, built.values[node.output[0]].shape)

    groups: dict[tuple[str, ...], list[NodeProto]] = {}
    for node in built.model.graph.node:
        candidate = node.op_type in ("Conv", "MatMul") and node.input[1] in constants
        if candidate and FLOAT32_SCOPES.isdisjoint(node.name.split("/")):
            groups.setdefault(tuple(node.input[1:]), []).append(node)
    return [
        Layer(
            name=nodes[0].name,
            nodes=tuple(nodes),
            weight=numpy_helper.to_array(constants[key[0]]),
            bias=numpy_helper.to_array(constants[key[1]]) if len(key) > 1 and key[1] else None,
            macs=sum(map(cost, nodes)),
        )
        for key, nodes in groups.items()
    ]


def quantised(
    built: BuiltGraph, layers: Sequence[Layer], ranges: Ranges, kept: Container[int] = ()
) -> BuiltGraph:
    """Return the graph with `layers` in int8, except for those at the indices `kept`."""
    model = onnx.ModelProto()
    model.CopyFrom(built.model)
    chosen = {n.name: i for i, layer in enumerate(layers) for n in layer.nodes if i not in kept}
    writer, nodes = _Writer(model), list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        i = chosen.get(node.name)
        if i is None:
            model.graph.node.append(node)
        else:
            writer.add(node, layers[i], *ranges[i], node.output[0])
    used = {name for node in model.graph.node for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    return replace(built, model=model)


def switched(built: BuiltGraph, layers: Sequence[Layer], ranges: Ranges) -> onnx.ModelProto:
    """Return the graph with an input [layers] of switches.

    A layer's result y becomes `y + switch * (y in int8 - y)`.
    """
    model = onnx.ModelProto()
    model.CopyFrom(built.model)
    chosen = {node.name: i for i, layer in enumerate(layers) for node in layer.nodes}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.input.append(helper.make_tensor_value_info(SWITCHES, TensorProto.FLOAT, [len(layers)]))
    writer, add = _Writer(model), model.graph.node.append
    add(
        helper.make_node(
            "Split", [SWITCHES], [f"switch_{i}" for i in range(len(layers))], num_outputs=len(layers)
        )
    )
    for node in nodes:
        i = chosen.get(node.name)
        if i is None:
            add(node)
            continue
        out = node.output[0]
        writer.add(node, layers[i], *ranges[i], f"{out}_int8")
        exact = NodeProto()
        exact.CopyFrom(node)
        exact.name, exact.output[0] = f"{node.name}/exact", f"{out}_exact"
        add(exact)
        add(helper.make_node("Sub", [f"{out}_int8", f"{out}_exact"], [f"{out}_error"]))
        add(helper.make_node("Mul", [f"{out}_error", f"switch_{i}"], [f"{out}_share"]))
        add(helper.make_node("Add", [f"{out}_exact", f"{out}_share"], [out]))
    return model


class _Writer:
    """Adds int8 copies of nodes to a model; a tensor that several of them read is rounded once."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._rounded: dict[tuple[str, Range], str] = {}
        self._constants: dict[str, str] = {}

    def add(self, node: NodeProto, layer: Layer, given: Range, made: Range, output: str) -> None:
        """Add `node` in int8 under the result name `output`.

        Only the results of convolutions are rounded: for matrix products, backends return float32 equally
        fast.
        """
        key = (node.input[0], given)
        if key not in self._rounded:
            self._rounded[key] = f"{node.input[0]}_rounded_{len(self._rounded)}"
            self._round(node.input[0], self._rounded[key], given)
        weights = self._weights(layer, _scale(given))
        copy = NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend([self._rounded[key], *weights])
        rounds = node.op_type == "Conv"
        copy.output[0] = f"{output}_unrounded" if rounds else output
        self._graph.node.append(copy)
        if rounds:
            self._round(copy.output[0], output, made)

    def _round(self, source: str, target: str, held: Range) -> None:
        scale = _scale(held)
        zero = np.uint8(np.clip(round(-held[0] / scale), 0, 255))
        pair = [self._constant(np.float32(scale)), self._constant(zero)]
        self._graph.node.extend(
            [
                helper.make_node(
                    "QuantizeLinear", [source, *pair], [f"{target}_u8"], name=f"{target}/Quantize"
                ),
                helper.make_node(
                    "DequantizeLinear", [f"{target}_u8", *pair], [target], name=f"{target}/Dequantize"
                ),
            ]
        )

    def _weights(self, layer: Layer, input_scale: float) -> list[str]:
        """Return the names of the layer's weight (dequantised int8) and of its bias (dequantised int32)."""
        others = tuple(axis for axis in range(layer.weight.ndim) if axis != layer.axis)
        scales = np.abs(layer.weight).max(axis=others) / 127.0
        if layer.bias is not None:  # the bias must fit into 32 bits
            scales = np.maximum(scales, np.abs(layer.bias) / (input_scale * 2.0**30))
        scales = np.where(scales > 0, scales, 1.0).astype(np.float32)
        shape = [-1 if axis == layer.axis else 1 for axis in range(layer.weight.ndim)]
        rounded = np.rint(layer.weight / scales.reshape(shape)).astype(np.int8)
        made = [self._integers(rounded, scales, layer.axis)]
        if layer.bias is not None:
            bias_scales = (scales.astype(np.float64) * np.float32(input_scale)).astype(np.float32)
            rounded = np.rint(layer.bias / bias_scales.astype(np.float64)).astype(np.int32)
            made.append(self._integers(rounded, bias_scales, 0))
        return made

    def _integers(self, values: np.ndarray, scales: np.ndarray, axis: int) -> str:
        names = [self._constant(a) for a in (values, scales, np.zeros(scales.shape, values.dtype))]
        target = f"{names[0]}_by_{names[1]}"
        if target not in self._constants:
            self._constants[target] = target
            self._graph.node.append(
                helper.make_node("DequantizeLinear", names, [target], name=f"{target}/Dequantize", axis=axis)
            )
        return target

    def _constant(self, value: np.ndarray | np.generic) -> str:
        array = np.asarray(value)
        key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        if key not in self._constants:
            self._constants[key] = f"int8_constant_{len(self._constants)}"
            self._graph.initializer.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]


def _scale(held: Range) -> float:
    return float(np.float32((held[1] - held[0]) / 255.0)) or 1.0
