"""A graph's twin that rounds as a backend does which computes in bfloat16, to prove such graphs anywhere.

From the first product on every result is rounded to 8 bits, and so is what products read; sums inside of a
product are float32. What lies before, such as the angles of the timesteps, stays float32, as in OpenVINO.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper

PRODUCTS = ("Conv", "MatMul", "Gemm")
INTEGERS = ("ArgMin",)  # operators that give something else than floats


def as_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The twin of a float32 graph; constants that only other constants are made of are left alone."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    nodes = list(twin.graph.node)
    del twin.graph.node[:]
    add = twin.graph.node.append
    floats = {t.name for t in twin.graph.initializer if t.data_type == TensorProto.FLOAT}
    constant = {t.name for t in twin.graph.initializer}
    rounded: dict[str, str] = {}  # by name: the name after rounding

    def through_bf16(name: str, target: str) -> str:
        add(
            helper.make_node(
                "Cast", [name], [f"{target}_bf16"], name=f"{target}/bf16", to=TensorProto.BFLOAT16
            )
        )
        add(
            helper.make_node(
                "Cast", [f"{target}_bf16"], [target], name=f"{target}/back", to=TensorProto.FLOAT
            )
        )
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


def _rename_outputs(model: onnx.ModelProto, rounded: dict[str, str]) -> None:
    """Give the graph's outputs their rounded values under their own names."""
    for output in model.graph.output:
        if output.name in rounded:
            output.name = rounded[output.name]
