"""Writes ONNX graphs node by node, with shared constants and inferred shapes and types.

The deployed graphs are not traced. Their speed and precision depend on decisions about single operators:
which ones a backend fuses, where a large tensor is cut so that it stays in cache, where half precision ends.
Each value carries its own precision and constants follow it, so a cast changes the precision of everything
after it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from moesr.export.graphs.kernel_call import KernelCall
from moesr.export.lowering import CPU, Lowering
from moesr.runtime.engine.graph_spec import BATCH, Boundary, Calibration, TensorSpec
from moesr.runtime.errors import EngineError

OPSET = 20  # has Gelu; ONNX Runtime 1.17, OpenVINO 2024.1 and TensorRT 10 are the first to read it
IR_VERSION = 9  # belongs to opset 20
BF16_OPSET, BF16_IR_VERSION = 22, 10  # the first with bfloat16 convolutions
FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
"""The type of a graph's values, by `Lowering.values`."""

NUMPY_TYPES: dict[int, Any] = {number: helper.tensor_dtype_to_np_dtype(number) for number in FLOATS.values()}

KERNEL_DOMAIN = "moesr"
"""The domain of the nodes that our kernels compute; the graph is cut at them, since no backend knows them."""

STORED_FROM = 1024
"""The smallest number of elements for which a constant is stored in half precision."""

STORED_ERROR = 2.0**-11
"""The largest relative L2 error of a matrix or kernel stored in half precision; others stay float32."""

Shape = tuple[int | str, ...]
Weight = np.ndarray | Tensor


@dataclass(frozen=True)
class Value:
    """A tensor of the graph. Its first dimension is usually the batch `"B"` or a multiple of it, `"64*B"`."""

    name: str
    shape: Shape
    dtype: int  # onnx.TensorProto.DataType

    def size(self, axis: int) -> int:
        """Return the length of an axis; TypeError if the axis depends on the batch."""
        length = self.shape[axis]
        if not isinstance(length, int):
            raise TypeError(f"{self.name} {self.shape}: axis {axis} is not fixed")
        return length


@dataclass(frozen=True)
class BuiltGraph:
    """A finished graph, its inputs and outputs, and its multiply-accumulates for one image (batch 1)."""

    model: onnx.ModelProto
    boundary: Boundary
    macs: int
    values: Mapping[str, Value] = field(default_factory=dict)
    calls: Mapping[str, KernelCall] = field(default_factory=dict)  # by node name, see `partition`
    calibration: Calibration | None = None  # of an int8 graph

    def to_bytes(self) -> bytes:
        """Serialise the graph; equal graphs give equal bytes."""
        return self.model.SerializeToString(deterministic=True)


class GraphBuilder:
    """A graph under construction. `lowering` decides how layers become operators."""

    def __init__(self, name: str, lowering: Lowering = CPU, *, open_sizes: bool = False) -> None:
        """With `open_sizes` layers are written without the image's size; see `open_sizes`."""
        self.name, self.lowering, self.open_sizes = name, lowering, open_sizes
        self._opset, self._ir = onnx_versions(lowering)
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[TensorSpec] = []
        self._outputs: list[TensorSpec] = []
        self._tensors: dict[str, onnx.TensorProto] = {}  # by digest
        self._loaded: dict[str, Value] = {}  # weights stored in half precision, after the cast to float32
        self._integers: dict[str, onnx.TensorProto] = {}  # by name; shape inference reads their values
        self._scope: list[str] = []
        self._macs = 0
        self._values: dict[str, Value] = {}
        self._calls: dict[str, KernelCall] = {}
        self._folded: set[str] = set()  # values made from constants only, which a session computes once
        self._once: dict[tuple, list[Value]] = {}  # such values by their node: equal nodes are written once
        self._opsets = [helper.make_opsetid("", self._opset)]

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes added inside, so that profiles and messages name their module."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def input(self, name: str, shape: Shape) -> Value:
        """Declare a float32 graph input."""
        self._inputs.append(TensorSpec(name, "float32", shape))
        self._values[name] = Value(name, shape, TensorProto.FLOAT)
        return self._values[name]

    def output(self, name: str, value: Value) -> None:
        """Declare `value`, cast to float32, as a graph output; only its batch may be open."""
        if not all(isinstance(size, int) or (i, size) == (0, BATCH) for i, size in enumerate(value.shape)):
            raise ValueError(f"{self.name}: output {name} has shape {value.shape}, which is not fixed")
        source = self.cast(value, TensorProto.FLOAT).name
        self._nodes.append(helper.make_node("Identity", [source], [name], name=name))
        self._values[name] = Value(name, value.shape, TensorProto.FLOAT)
        self._outputs.append(TensorSpec(name, "float32", value.shape))

    def op(self, op_type: str, *inputs: Value | Weight | None, **attributes: Any) -> Value:
        """Add a node with one output and return it; see `ops`."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(
        self, op_type: str, outputs: int, *inputs: Value | Weight | None, **attributes: Any
    ) -> list[Value]:
        """Add a node with several outputs and return them.

        Floating-point constants get the precision of the first floating-point value among the inputs. None
        leaves an optional input out; at the end of the list it is dropped, as TensorRT requires.
        """
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        floats = (i.dtype for i in inputs if isinstance(i, Value) and i.dtype in NUMPY_TYPES)
        like = next(floats, TensorProto.FLOAT)
        values = [i if i is None or isinstance(i, Value) else self._weight(i, like) for i in inputs]
        name = "/".join([*self._scope, f"{op_type}_{len(self._nodes)}"])
        names = [value.name if value else "" for value in values]
        given = [value for value in values if value]
        folded = all(value.name in self._folded for value in given)
        key = (op_type, outputs, *names, repr(sorted(attributes.items())))
        if folded and key in self._once:
            return self._once[key]
        results = [f"{len(self._nodes)}:{i}" for i in range(outputs)]
        node = helper.make_node(op_type, names, results, name=name, **attributes)
        self._nodes.append(node)
        made = self._inferred(node, given)
        self._values |= {value.name: value for value in made}
        if folded:
            self._folded.update(results)
            self._once[key] = made
        else:
            self._macs += macs_of(op_type, [value.shape for value in given], made[0].shape)
        return made

    def kernel(
        self,
        op: str,
        shape: Mapping[str, int],
        inputs: Mapping[str, Value],
        output: str,
        like: Value,
        suffix: str = "",
        **call: Any,
    ) -> Value:
        """Add a node for one of our kernels; its output has the shape and type of `like`."""
        name = "/".join([*self._scope, f"{op}_{len(self._nodes)}"])
        made = Value(f"{len(self._nodes)}:0{suffix}", like.shape, like.dtype)
        sources = {buffer: value.name for buffer, value in inputs.items()}
        node = helper.make_node(op, list(sources.values()), [made.name], name=name, domain=KERNEL_DOMAIN)
        self._nodes.append(node)
        self._values[made.name] = made
        dtype = next(kind for kind, number in FLOATS.items() if number == like.dtype)
        self._calls[name] = KernelCall(op, dtype, shape, sources, (output, made.name), **call)
        return made

    def named(self, value: Value, suffix: str) -> Value:
        """Return the same value under a name that ends in `suffix`."""
        name = f"{value.name}{suffix}"
        return self._values[name] if name in self._values else self.renamed(value, name)

    def renamed(self, value: Value, name: str) -> Value:
        """Return the same value under another name."""
        self._nodes.append(helper.make_node("Identity", [value.name], [name], name=f"name {name}"))
        self._values[name] = replace(value, name=name)
        return self._values[name]

    def cast(self, value: Value, dtype: int) -> Value:
        """Cast to a data type, unless the value has it already."""
        return value if value.dtype == dtype else self.op("Cast", value, to=dtype)

    def compute(self, value: Value) -> Value:
        """Cast to the precision that the graph computes in."""
        return self.cast(value, FLOATS[self.lowering.values])

    def float32(self, value: Value) -> Value:
        """Cast to float32, for values that half precision cannot hold."""
        return self.cast(value, TensorProto.FLOAT)

    def reshape(self, value: Value, *shape: int) -> Value:
        """Reshape. A leading 0 keeps the batch; a leading -1 merges dimensions into it or splits them off."""
        reshaped = self.op("Reshape", value, np.array(shape, np.int64))
        if shape[0] != -1 or isinstance(reshaped.shape[0], int):
            return reshaped
        images = _elements(value.shape) // _elements(shape[1:])  # leading entries per image of the batch
        return replace(reshaped, shape=(BATCH if images == 1 else f"{images}*{BATCH}", *shape[1:]))

    def constant(self, weight: Weight) -> Value:
        """Add a float32 constant that is never rounded for storage."""
        return self._stored(self._array(weight, TensorProto.FLOAT), 0.0)

    def split(self, value: Value, axis: int, sizes: Sequence[int]) -> list[Value]:
        """Split along an axis into pieces of these sizes."""
        if len(sizes) == 1:
            return [value]
        return self.ops("Split", len(sizes), value, np.array(sizes, np.int64), axis=axis)

    def slice(self, value: Value, axis: int, start: int, stop: int) -> Value:
        """Keep [start, stop) of an axis."""
        if (start, stop) == (0, value.size(axis)):
            return value
        return self.op("Slice", value, *(np.array([i], np.int64) for i in (start, stop, axis)))

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Concatenate along an axis."""
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=axis)

    def finish(self) -> BuiltGraph:
        """Return the finished graph; the builder must not be used afterwards."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [_declared(spec) for spec in self._inputs],
            [_declared(spec) for spec in self._outputs],
        )
        model = helper.make_model(
            graph, opset_imports=self._opsets, ir_version=self._ir, producer_name="moesr"
        )
        for digest in list(self._tensors):  # moved one at a time, as weights may fill half of the memory
            model.graph.initializer.append(self._tensors.pop(digest))
        boundary = Boundary(tuple(self._inputs), tuple(self._outputs))
        return BuiltGraph(model, boundary, self._macs, self._values, self._calls)

    def _inferred(self, node: onnx.NodeProto, inputs: Sequence[Value]) -> list[Value]:
        """Return the outputs of a node with their shapes and types."""
        types = {v.name: helper.make_tensor_type_proto(v.dtype, v.shape) for v in inputs}
        integers = {v.name: self._integers[v.name] for v in inputs if v.name in self._integers}
        inferred = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, self._opset),
            node,
            types,
            integers,
            opset_imports=self._opsets,
            ir_version=self._ir,
        )
        return [_value(name, inferred[name]) for name in node.output]

    def _weight(self, weight: Weight, like: int) -> Value:
        """Return a constant in the precision `like`; matrices and kernels may be rounded for storage."""
        array = self._array(weight, like)
        return self._stored(array, STORED_ERROR if sum(size > 1 for size in array.shape) > 1 else 0.0)

    def _stored(self, array: np.ndarray, largest_error: float) -> Value:
        """Return a constant, stored in half precision with a cast if that is wanted and rounds little."""
        if array.dtype != np.float32 or self.lowering.store != "fp16" or array.size < STORED_FROM:
            return self._constant(array)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        error = np.linalg.norm((half.astype(np.float64) - array).ravel())
        if not error <= largest_error * np.linalg.norm(array.astype(np.float64).ravel()):
            return self._constant(array)
        stored = self._constant(half)
        if stored.name not in self._loaded:
            self._loaded[stored.name] = self.cast(stored, TensorProto.FLOAT)
        return self._loaded[stored.name]

    def _array(self, weight: Weight, like: int) -> np.ndarray:
        """Return a constant as a contiguous array; EngineError if it is not finite in the type of `like`."""
        array = weight.detach().numpy() if isinstance(weight, Tensor) else np.asarray(weight)
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                array = array.astype(NUMPY_TYPES[like])
            if not np.isfinite(array).all():
                wide = like == TensorProto.FLOAT
                cure = "train again" if wide else f"export without --{self.lowering.precision}"
                place = "/".join([self.name, *self._scope])
                raise EngineError(f"a weight of {place} is not finite as {array.dtype}; {cure}")
        return np.asarray(array, order="C")

    def _constant(self, array: np.ndarray) -> Value:
        """Store a constant; equal constants are stored once."""
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        if digest not in self._tensors:
            tensor = numpy_helper.from_array(array, f"constant_{len(self._tensors)}")
            self._tensors[digest] = tensor
            self._folded.add(tensor.name)
            if tensor.data_type == TensorProto.INT64:
                self._integers[tensor.name] = tensor
        tensor = self._tensors[digest]
        return Value(tensor.name, tuple(tensor.dims), tensor.data_type)


def onnx_versions(lowering: Lowering) -> tuple[int, int]:
    """Return the opset and the IR version of a lowering's files."""
    return (BF16_OPSET, BF16_IR_VERSION) if lowering.values == "bf16" else (OPSET, IR_VERSION)


def _declared(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.dims)


def _value(name: str, inferred: onnx.TypeProto) -> Value:
    return Value(name, _shape(inferred), inferred.tensor_type.elem_type)


def _shape(inferred: onnx.TypeProto) -> Shape:
    dims = inferred.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)


def macs_of(op_type: str, inputs: Sequence[Shape], output: Shape) -> int:
    """Return a node's multiply-accumulates for one image: products per output element, times elements."""
    if op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    terms = _elements(inputs[1][1:]) if op_type == "Conv" else _elements(inputs[0][-1:])
    return terms * _elements(output)


def _elements(shape: Shape) -> int:
    """Return the number of elements at batch 1; a dimension is a number, "B" or "n*B"."""
    return math.prod(d if isinstance(d, int) else int(d.removesuffix(BATCH).rstrip("*") or 1) for d in shape)
