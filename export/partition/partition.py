"""Cuts a graph at its kernel calls into parts: graphs for a compiler, and the kernels between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper

from moesr.export.bfloat16 import without_bf16
from moesr.export.graphs.builder import KERNEL_DOMAIN, BuiltGraph, Value
from moesr.export.graphs.kernel_call import KERNEL_TYPES, KernelCall
from moesr.runtime.backends.ort import session_options
from moesr.runtime.engine.graph_spec import BATCH
from moesr.runtime.engine.partitioned_graph import NHWC, VECTOR

Part = onnx.ModelProto | KernelCall


def cut(built: BuiltGraph) -> list[Part]:
    """Return the parts in order; each reads inputs of the whole graph or results of earlier parts.

    Every node runs as early as possible, which gives the fewest parts. Nodes that depend on constants alone
    are copied into every part that needs them. Values between two compiled parts are channels-last, as
    convolutions prefer.
    """
    stages, constant = _stages(built)
    names = _channels_last(built, stages)
    built = replace(
        built,
        values={**built.values, **{new: replace(built.values[old], name=new) for old, new in names.items()}},
    )
    for nodes in stages.values():
        for node in nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
    parts: list[Part] = []
    for stage, nodes in sorted(stages.items()):
        if stage % 2:
            parts += [built.calls[node.name] for node in nodes]
        else:
            others = [node for s, some in stages.items() if s != stage for node in some]
            parts.append(_part(built, nodes, others, constant))
    return parts


def _stages(
    built: BuiltGraph,
) -> tuple[dict[int, list[onnx.NodeProto]], dict[str, onnx.NodeProto | None]]:
    """Return nodes by stage (kernels have odd stages), and the nodes that make constant values, by value."""
    graph = onnx.GraphProto()
    graph.CopyFrom(built.model.graph)
    constant: dict[str, onnx.NodeProto | None] = dict.fromkeys(t.name for t in graph.initializer)
    stages: dict[int, list[onnx.NodeProto]] = defaultdict(list)
    made = {value.name: 0 for value in graph.input}  # the stage that makes each value
    for node in graph.node:
        given = [name for name in node.input if name and name not in constant]
        if not given:
            constant |= dict.fromkeys(node.output, node)
            continue
        before = max(made[name] for name in given)
        stage = before + (before % 2 if node.domain != KERNEL_DOMAIN else 1 + before % 2)
        stages[stage].append(node)
        made |= dict.fromkeys(node.output, stage)
    return stages, constant


def _channels_last(built: BuiltGraph, stages: Mapping[int, list[onnx.NodeProto]]) -> dict[str, str]:
    """New names, by old names, of half-precision images that pass from one compiled part to another."""
    made = {name: stage for stage, nodes in stages.items() for node in nodes for name in node.output}
    seen = {name for stage, nodes in stages.items() if stage % 2 for n in nodes for name in n.input}
    crossing = {
        name
        for stage, nodes in stages.items()
        for node in nodes
        for name in node.input
        if made.get(name, stage) != stage and made[name] % 2 == 0 and name not in seen
    }
    return {name: f"{name}{NHWC}" for name in sorted(crossing) if _may_be_last(built.values[name])}


def _may_be_last(value: Value) -> bool:
    half = value.dtype in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return half and len(value.shape) == 4 and value.size(1) % VECTOR == 0


def _part(
    built: BuiltGraph,
    nodes: list[onnx.NodeProto],
    others: Iterable[onnx.NodeProto],
    constant: Mapping[str, onnx.NodeProto | None],
) -> onnx.ModelProto:
    """Return the graph of some nodes, including the constant nodes that they need."""
    inside, wanted = (
        {name for node in nodes for name in node.output},
        {o.name for o in built.model.graph.output},
    )
    wanted |= {name for node in others for name in node.input}
    taken = [name for node in nodes for name in node.input if name and name not in constant]
    inputs = [built.values[name] for name in dict.fromkeys(taken) if name not in inside]
    outputs = [built.values[name] for node in nodes for name in node.output if name in wanted]
    before = _constants(nodes, constant)
    used = {name for node in (*before, *nodes) for name in node.input}
    graph = helper.make_graph(
        [*before, *nodes],
        built.model.graph.name,
        [_declared(value) for value in inputs],
        [_declared(value) for value in outputs],
        initializer=[tensor for tensor in built.model.graph.initializer if tensor.name in used],
    )
    opsets, ir_version = built.model.opset_import, built.model.ir_version
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="moesr")


def _constants(
    nodes: Iterable[onnx.NodeProto], constant: Mapping[str, onnx.NodeProto | None]
) -> list[onnx.NodeProto]:
    """Return the constant nodes that some nodes need, in an order of execution."""
    found: dict[str, onnx.NodeProto] = {}

    def visit(node: onnx.NodeProto) -> None:
        for name in node.input:
            maker = constant.get(name)
            if maker is not None and maker.name not in found:
                visit(maker)
                found[maker.name] = maker

    for node in nodes:
        visit(node)
    return list(found.values())


def _declared(value: Value) -> onnx.ValueInfoProto:
    if value.shape[:1] != (BATCH,) or not all(isinstance(size, int) for size in value.shape[1:]):
        raise ValueError(f"{value.name} {value.shape} crosses a cut, but only its batch may be open")
    return helper.make_tensor_value_info(value.name, value.dtype, value.shape)


def run(
    parts: Iterable[Part],
    inputs: Mapping[str, np.ndarray],
    output: str,
    on_graph: Callable[[int, Mapping[str, np.ndarray]], None] = lambda number, given: None,
) -> np.ndarray:
    """Run the parts on the whole graph's inputs: graphs in ONNX Runtime, kernels by their references.

    Between parts bfloat16 values are kept as float32, since NumPy has no such type. `on_graph` is called with
    the number and the inputs of each graph before it runs.
    """
    values, number = dict(inputs), 0
    for part in parts:
        if isinstance(part, KernelCall):
            given = {name: torch.from_numpy(values[value]) for name, value in part.inputs.items()}
            kept = next(iter(given.values())).dtype
            values[part.output[1]] = part.reference(given).to(KERNEL_TYPES[part.dtype]).to(kept).numpy()
            continue
        twin = without_bf16(part).SerializeToString()
        session = ort.InferenceSession(twin, session_options(), ["CPUExecutionProvider"])
        names = [value.name for value in part.graph.output]
        taken = {value.name: values[value.name] for value in part.graph.input}
        on_graph(number, taken)
        number += 1
        made = (np.asarray(value) for value in session.run(names, taken))
        values |= dict(zip(names, made, strict=True))
    return values[output]
