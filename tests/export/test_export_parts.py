"""A decoder cut at our kernels: the parts with the kernels' references give the result of the whole graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import relative_l2
from graphs import TINY, decoder_inputs, random_decoder, run

from moesr.export.graphs.builder import FLOATS
from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.kernel_call import KernelCall
from moesr.export.graphs.kernel_nodes import fused_time_ratio
from moesr.export.lowering import lowering
from moesr.export.partition import partition
from moesr.runtime.engine.partitioned_graph import NHWC

TILE = 64
LIMITS = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}


@pytest.fixture(scope="module")
def network():
    return random_decoder()


def parts_of(network, precision: str, **choices: Any) -> list[partition.Part]:
    choices = dataclasses.replace(lowering("gpu", precision), kernels=True, **choices)
    return partition.cut(decoder_graph(network, TILE // 4, choices))


@pytest.mark.parametrize("precision", LIMITS)
def test_parts_give_the_result_of_the_whole_graph(network, precision):
    inputs = decoder_inputs(network, [0.3, 1.0], TILE)
    got = partition.run(parts_of(network, precision), inputs, "image")
    whole = decoder_graph(network, TILE // 4, lowering("gpu", "fp32"))
    assert relative_l2(got, run(whole, inputs)) < LIMITS[precision]


@pytest.mark.parametrize("residuals", ["plans", "kernels", "estimated"])
def test_inverted_residuals_are_plans_or_kernels_as_chosen(network, residuals):
    parts = parts_of(network, "fp16", residuals=residuals)
    calls = [part for part in parts if isinstance(part, KernelCall) and part.op == "inverted_residual"]
    blocks = [name for name, m in network.named_modules() if type(m).__name__ == "InvertedResidual"]
    assert blocks and (residuals == "estimated" or len(calls) == (0 if residuals == "plans" else len(blocks)))
    inputs = decoder_inputs(network, [0.3, 1.0], TILE)
    whole = decoder_graph(network, TILE // 4, lowering("gpu", "fp32"))
    assert relative_l2(partition.run(parts, inputs, "image"), run(whole, inputs)) < LIMITS["fp16"]


def test_published_inverted_residuals_are_estimated_faster_as_plans():
    """The kernel is limited by the rate at which a multiprocessor issues instructions."""
    sizes = [(128, 128, 512), (128, 256, 256), (256, 256, 128), (512, 256, 256), (256, 128, 512)]
    names = "channels", "out", "height"
    shapes = [dict(zip(names, size, strict=True)) | {"width": size[2]} for size in sizes]
    assert all(fused_time_ratio(shape, "fp16") > 1 for shape in shapes)


def test_inverted_residuals_are_plans_by_default(network):
    choices = dataclasses.replace(lowering("gpu", "fp16"), kernels=True)
    assert "inverted_residual" not in decoder_graph(network, TILE // 4, choices).calls
    assert {call.op for call in decoder_graph(network, TILE // 4, choices).calls.values()} == {
        "aff_filter",
        "attention",
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_images_between_compiled_parts_are_channels_last(network, precision):
    """Kernels that work on planes get planes, and the layout of the decoder's inputs and outputs stays."""
    parts = parts_of(network, precision, residuals="kernels")
    graphs = [part.graph for part in parts if isinstance(part, onnx.ModelProto)]
    sides = {v.name: v for graph in graphs for v in (*graph.input, *graph.output)}
    planes = {
        name
        for part in parts
        if isinstance(part, KernelCall) and part.op != "inverted_residual"
        for name in (*part.inputs.values(), part.output[1])
    }
    assert planes and not any(name.endswith(NHWC) for name in planes | {"z", "lr", "image"})
    others = {name: v.type.tensor_type for name, v in sides.items() if name not in planes}
    for name, kind in others.items():
        dims = [dim.dim_value for dim in kind.shape.dim]
        fits = kind.elem_type == FLOATS[precision] and len(dims) == 4 and dims[1] % 8 == 0
        assert name.endswith(NHWC) == fits
    assert sum(name.endswith(NHWC) for name in others) > 10


@pytest.mark.parametrize("precision", LIMITS)
def test_filters_and_wide_attention_are_kernels(network, precision):
    parts = parts_of(network, precision)
    calls = [part for part in parts if isinstance(part, KernelCall)]
    assert [call.op for call in calls].count("attention") == 1
    filters = [name for name, m in network.named_modules() if type(m).__name__ == "AFFFilter"]
    assert [call.op for call in calls].count("aff_filter") == len(filters) > 0
    assert all(call.dtype == precision for call in calls)
    norms = [(call.shape["norm"], sorted(call.inputs)) for call in calls if call.op == "aff_filter"]
    assert norms == [(1, ["scale", "shift", "x"])] * len(filters), "kernels include the norm and the residual"
    for part in parts:
        if isinstance(part, onnx.ModelProto):
            onnx.checker.check_model(part)
            assert not {"DFT", "Softmax"} & {node.op_type for node in part.graph.node}


def test_parts_come_after_their_inputs(network):
    """A part reads only earlier values, each value is written once, and no two graphs follow one another."""
    parts = parts_of(network, "fp16")
    there = {"z", "lr", "fidelity"}
    for before, part in zip([None, *parts], parts, strict=False):
        if isinstance(part, KernelCall):
            takes, gives = set(part.inputs.values()), {part.output[1]}
        else:
            takes = {value.name for value in part.graph.input}
            gives = {value.name for value in part.graph.output}
            assert not isinstance(before, onnx.ModelProto)
        assert takes <= there and not gives & there
        there |= gives
    assert "image" in there


def test_decoder_without_kernels_is_not_cut(network):
    (part,) = partition.cut(decoder_graph(network, TILE // 4, lowering("gpu", "fp32")))
    inputs = decoder_inputs(network, [0.3], TILE)
    whole = decoder_graph(network, TILE // 4, lowering("gpu", "fp32"))
    np.testing.assert_array_equal(partition.run([part], inputs, "image"), run(whole, inputs))


def test_attention_of_unsupported_width_stays_in_the_graph():
    """The kernel needs a width that is a power of two."""
    decoder = dataclasses.replace(TINY.decoder, channels=24)
    network = random_decoder(dataclasses.replace(TINY, decoder=decoder))
    assert "attention" not in {part.op for part in parts_of(network, "fp32") if isinstance(part, KernelCall)}


@pytest.mark.parametrize("precision", LIMITS)
def test_weights_are_packed_for_the_kernels(network, precision):
    from moesr.kernels.registry import OPS

    call = next(
        part for part in parts_of(network, precision) if isinstance(part, KernelCall) and part.weights
    )
    plan = OPS[call.op].plan({"batch": 3, **call.shape}, call.dtype, 90)
    wanted = {b.name: (b.dtype, b.dims(plan.scalars)) for b in plan.buffers if b.role == "input"}
    names = {"fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}
    for name, weight in call.packed().items():
        dtype, dims = wanted[name]
        assert (str(weight.dtype).removeprefix("torch."), tuple(weight.shape)) == (names[dtype], dims)
