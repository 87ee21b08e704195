"""Float32 twins of graphs that are computed in bfloat16, so that such graphs can be proved on any machine.

There are two cases. In the first, a backend such as OpenVINO takes a float32 graph and computes it in
bfloat16: from the first matrix product on, every result and every input of a product is rounded to 8 bits,
while sums inside a product are float32. Earlier values, such as the angles of the timesteps, stay float32. In
the second, the graph itself is bfloat16, a type for which ONNX Runtime has hardly any kernels on a CPU.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper

PRODUCTS = ("Conv", "MatMul", "Gemm")
INTEGERS = ("ArgMin",)  # operators whose result is not floating point
MOVES = ("Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


def as_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the twin of a float32 graph. Values computed from constants alone are not rounded."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    nodes = list(twin.graph.node)
    del twin.graph.node[:]
    add = twin.graph.node.append
    floats = {t.name for t in twin.graph.initializer if t.data_type == TensorProto.FLOAT}
    constant = {t.name for t in twin.graph.initializer}
    rounded: dict[str, str] = {}  # name of each rounded value, by the name before rounding

    def through_bf16(name: str, target: str) -> str:
        twin.graph.node.extend(_round(name, target))
        rounded[name] = target
        return target

    for source in nodes:
        node = NodeProto()
        node.CopyFrom(source)
        product = node.op_type in PRODUCTS
        follows = any(name in rounded for name in node.input)
        folded = all(name in constant for name in node.input)
        for i, name in enumerate(node.input):
            if name in rounded:
                node.input[i] = rounded[name]
            elif product and not folded and name and (i < 2 or name in floats):
                node.input[i] = through_bf16(name, f"{name}_rounded")
        add(node)
        if folded:
            constant.update(node.output)
        elif (product or follows) and node.op_type not in INTEGERS:
            for name in node.output:
                through_bf16(name, f"{name}_rounded")
    _rename_outputs(twin, rounded)
    return twin


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=to)


def _round(source: str, target: str) -> list[NodeProto]:
    """Return nodes that round a float32 value to the nearest bfloat16 value."""
    half = f"{target}_bf16"
    return [_cast(source, half, TensorProto.BFLOAT16), _cast(half, target, TensorProto.FLOAT)]


def _rename_outputs(model: onnx.ModelProto, rounded: dict[str, str]) -> None:
    """Give the graph's outputs their rounded values under their own names."""
    for output in model.graph.output:
        if output.name in rounded:
            output.name = rounded[output.name]


def without_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the twin of a bfloat16 graph: its values are float32 and are rounded after each node."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    graph, nodes = twin.graph, list(twin.graph.node)
    del graph.node[:]
    half = {t.name for t in graph.initializer if t.data_type == TensorProto.BFLOAT16}
    widened = {name: f"{name}_wide" for name in half}
    graph.node.extend(_cast(name, wide, TensorProto.FLOAT) for name, wide in widened.items())
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            half.add(value.name)
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in nodes:
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        rounds = to == TensorProto.BFLOAT16 if node.op_type == "Cast" else not half.isdisjoint(node.input)
        node.input[:] = [widened.get(name, name) for name in node.input]
        names = list(node.output)
        if rounds and node.op_type not in INTEGERS:
            half.update(names)
            if node.op_type not in MOVES:
                node.output[:] = [f"{name}_exact" for name in names]
        graph.node.append(node)
        for name, made in zip(names, node.output, strict=True):
            if name != made:
                graph.node.extend(_round(made, name))
    return twin
