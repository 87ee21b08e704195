"""A small writer of ONNX graphs: nodes in order, shared constants, inferred shapes and types.

The deployed graphs are written operator by operator rather than traced, because their speed and their
precision are decisions about operators: which ones a backend fuses, where a large tensor is cut so that it
stays in cache, where half precision ends. A value carries its own precision and constants follow it, so a
cast is all it takes to change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from moesr.runtime.errors import EngineError

OPSET = 20  # Gelu; taken by ONNX Runtime 1.17, OpenVINO 2024.1 and TensorRT 10 and later
IR_VERSION = 9  # the one of opset 20
BATCH = "B"
NUMPY_TYPES: dict[int, type[np.floating]] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}

Shape = tuple[int | str, ...]
Weight = np.ndarray | Tensor


@dataclass(frozen=True)
class Value:
    """A tensor of the graph. The first dimension is usually the batch, `"B"`, or holds it: `"64*B"`."""

    name: str
    shape: Shape
    dtype: int  # onnx.TensorProto.DataType

    def size(self, axis: int) -> int:
        """Length of a fixed axis."""
        length = self.shape[axis]
        if not isinstance(length, int):
            raise TypeError(f"{self.name} {self.shape}: axis {axis} is not fixed")
        return length


@dataclass(frozen=True)
class Graph:
    """A finished graph; `macs` counts all multiply-accumulates of convolutions and products, at batch 1."""

    model: onnx.ModelProto
    macs: int


class GraphBuilder:
    """One graph under construction. `half` asks for half precision inside: `compute` casts to it."""

    def __init__(self, name: str, half: bool = False) -> None:
        self.name = name
        self.compute_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._scope: list[str] = []
        self._macs = 0
        self._folded: set[str] = set()  # values made of constants alone, which a session computes once
        self._opsets = [helper.make_opsetid("", OPSET)]

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes made inside: profiles and error messages then say where they belong."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def input(self, name: str, shape: Shape) -> Value:
        """Declare a float32 graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return Value(name, shape, TensorProto.FLOAT)

    def output(self, name: str, value: Value, shape: Shape) -> None:
        """Declare `value`, as float32, to be a graph output; `shape` is what it must have."""
        if value.shape != shape:
            raise ValueError(f"{self.name}: output {name} has shape {value.shape}, expected {shape}")
        self._nodes.append(
            helper.make_node("Identity", [self.cast(value, TensorProto.FLOAT).name], [name], name=name)
        )
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def op(self, op_type: str, *inputs: Value | Weight | None, **attributes: Any) -> Value:
        """Add a node with one output."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(
        self, op_type: str, outputs: int, *inputs: Value | Weight | None, **attributes: Any
    ) -> list[Value]:
        """Add a node with several outputs. Float constants take the precision of the first float value."""
        floats = (i.dtype for i in inputs if isinstance(i, Value) and i.dtype in NUMPY_TYPES)
        like = next(floats, TensorProto.FLOAT)
        name = "/".join([*self._scope, f"{op_type}_{len(self._nodes)}"])
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        names: list[str] = []
        for item in inputs:
            if item is None:
                names.append("")
            elif isinstance(item, Value):
                names.append(item.name)
                types[item.name] = helper.make_tensor_type_proto(item.dtype, item.shape)
            else:
                tensor = self._constant(item, like)
                names.append(tensor.name)
                types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
                data[tensor.name] = tensor
        node = helper.make_node(
            op_type, names, [f"{name}:{i}" for i in range(outputs)], name=name, **attributes
        )
        self._nodes.append(node)
        schema = onnx.defs.get_schema(op_type, OPSET)
        small = {k: v for k, v in data.items() if v.data_type == TensorProto.INT64}
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, node, types, small, opset_imports=self._opsets, ir_version=IR_VERSION
        )
        values = [_value(output, inferred[output]) for output in node.output]
        if all(n in data or n in self._folded for n in names if n):
            self._folded.update(node.output)
        else:
            self._macs += _macs(op_type, [_shape(types[n]) for n in names if n], values[0].shape)
        return values

    def cast(self, value: Value, dtype: int) -> Value:
        """Change the precision, where it differs."""
        return value if value.dtype == dtype else self.op("Cast", value, to=dtype)

    def compute(self, value: Value) -> Value:
        """Cast to the precision the graph computes in."""
        return self.cast(value, self.compute_type)

    def float32(self, value: Value) -> Value:
        """Cast to float32, for what half precision cannot hold."""
        return self.cast(value, TensorProto.FLOAT)

    def reshape(self, value: Value, *shape: int) -> Value:
        """Reshape. A leading 0 keeps the batch, a leading -1 merges dimensions with it or takes them out."""
        reshaped = self.op("Reshape", value, np.array(shape, np.int64))
        if shape[0] != -1:
            return reshaped
        images = _elements(value.shape) // _elements(shape[1:])  # leading entries for each image of the batch
        return replace(reshaped, shape=(BATCH if images == 1 else f"{images}*{BATCH}", *shape[1:]))

    def constant(self, weight: Weight, dtype: int = TensorProto.FLOAT) -> Value:
        """A constant as a value, for a node that has no other input."""
        tensor = self._constant(weight, dtype)
        self._folded.add(tensor.name)
        return Value(tensor.name, tuple(tensor.dims), tensor.data_type)

    def split(self, value: Value, axis: int, sizes: Sequence[int]) -> list[Value]:
        """Cut along an axis into pieces of these sizes."""
        if len(sizes) == 1:
            return [value]
        return self.ops("Split", len(sizes), value, np.array(sizes, np.int64), axis=axis)

    def slice(self, value: Value, axis: int, start: int, stop: int) -> Value:
        """Keep [start, stop) of an axis."""
        if (start, stop) == (0, value.size(axis)):
            return value
        return self.op("Slice", value, *(np.array([i], np.int64) for i in (start, stop, axis)))

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Join along an axis."""
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=axis)

    def finish(self) -> Graph:
        """Return the finished graph."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._constants.values())
        )
        model = helper.make_model(
            graph, opset_imports=self._opsets, ir_version=IR_VERSION, producer_name="moesr"
        )
        return Graph(model, self._macs)

    def _constant(self, weight: Weight, like: int) -> onnx.TensorProto:
        """Store a constant once however often it is used; float ones in the precision `like`."""
        array = weight.detach().numpy() if isinstance(weight, Tensor) else np.asarray(weight)
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                array = array.astype(NUMPY_TYPES[like])
            if not np.isfinite(array).all():
                raise EngineError(
                    f"a weight of {'/'.join([self.name, *self._scope])} is not finite as {array.dtype}; "
                    "export without --fp16, or train again if float32 has it too"
                )
        array = np.asarray(array, order="C")
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        if digest not in self._constants:
            self._constants[digest] = numpy_helper.from_array(array, f"constant_{len(self._constants)}")
        return self._constants[digest]


def _value(name: str, inferred: onnx.TypeProto) -> Value:
    return Value(name, _shape(inferred), inferred.tensor_type.elem_type)


def _shape(inferred: onnx.TypeProto) -> Shape:
    dims = inferred.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)


def _macs(op_type: str, inputs: Sequence[Shape], output: Shape) -> int:
    """Multiply-accumulates of a node for one image: each element of the output sums so many products."""
    if op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    terms = _elements(inputs[1][1:]) if op_type == "Conv" else _elements(inputs[0][-1:])
    return terms * _elements(output)


def _elements(shape: Shape) -> int:
    """Elements of a tensor at batch 1, where a dimension is a number, "B" or "n*B"."""
    return math.prod(d if isinstance(d, int) else int(d.removesuffix(BATCH).rstrip("*") or 1) for d in shape)
