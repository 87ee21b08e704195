"""The decoder cut at what our kernels compute: the parts and the references are the whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from conftest import relative_l2
from graphs import TINY, decoder_inputs, random_decoder, run

from moesr.export import cutting
from moesr.export.decoder import decoder_graph
from moesr.export.kernel_calls import KernelCall
from moesr.export.lowering import lowering

TILE = 64
LIMITS = {"fp32": 1e-5, "fp16": 5e-3}


@pytest.fixture(scope="module")
def network():
    return random_decoder()


def parts_of(network, precision: str) -> list[cutting.Part]:
    choices = dataclasses.replace(lowering("gpu", precision), kernels=True)
    return cutting.cut(decoder_graph(network, TILE // 4, choices))


@pytest.mark.parametrize("precision", LIMITS)
def test_parts_equal_the_whole(network, precision):
    inputs = decoder_inputs(network, [0.3, 1.0], TILE)
    got = cutting.run(parts_of(network, precision), inputs, "image")
    whole = decoder_graph(network, TILE // 4, lowering("gpu", "fp32"))
    assert relative_l2(got, run(whole, inputs)) < LIMITS[precision]


def test_every_filter_and_the_wide_attention_are_kernels(network):
    parts = parts_of(network, "fp16")
    calls = [part for part in parts if isinstance(part, KernelCall)]
    assert [call.op for call in calls].count("attention") == 1
    filters = [name for name, m in network.named_modules() if type(m).__name__ == "AFFFilter"]
    assert [call.op for call in calls].count("aff_filter") == len(filters) > 0
    assert all(call.dtype == "fp16" for call in calls)
    for part in parts:
        if isinstance(part, onnx.ModelProto):
            onnx.checker.check_model(part)
            assert not {"DFT", "Softmax"} & {node.op_type for node in part.graph.node}


def test_parts_follow_their_inputs(network):
    """What a part takes is there by then, every value has one maker, and no part is split for nothing."""
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


def test_without_kernels_nothing_is_cut(network):
    (part,) = cutting.cut(decoder_graph(network, TILE // 4, lowering("gpu", "fp32")))
    inputs = decoder_inputs(network, [0.3], TILE)
    whole = decoder_graph(network, TILE // 4, lowering("gpu", "fp32"))
    np.testing.assert_array_equal(cutting.run([part], inputs, "image"), run(whole, inputs))


def test_what_kernels_do_not_take_stays_in_the_graph():
    """A head that is no power of two wide."""
    decoder = dataclasses.replace(TINY.decoder, channels=24)
    network = random_decoder(dataclasses.replace(TINY, decoder=decoder))
    assert {part.op for part in parts_of(network, "fp32") if isinstance(part, KernelCall)} == {"aff_filter"}


def test_weights_are_packed_for_the_kernels(network):
    from moesr.kernels.registry import OPS

    call = next(part for part in parts_of(network, "fp16") if isinstance(part, KernelCall) and part.weights)
    plan = OPS[call.op].plan({"batch": 3, **call.shape}, call.dtype, 90)
    wanted = {b.name: (b.dtype, plan.dims(b)) for b in plan.buffers if b.role == "input"}
    names = {"fp16": "float16", "fp32": "float32"}
    for name, weight in call.packed().items():
        dtype, dims = wanted[name]
        assert (str(weight.dtype).removeprefix("torch."), tuple(weight.shape)) == (names[dtype], dims)
