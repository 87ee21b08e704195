"""Layers written as graph operators: Winograd convolution, GroupNorm, multiply-accumulates, storage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import relative_l2
from graphs import random_network, run
from onnx import TensorProto
from torch import nn
from torch.nn import functional as F

from moesr.export.graphs import layers, winograd
from moesr.export.graphs.builder import GraphBuilder
from moesr.export.lowering import CPU, GPU
from moesr.runtime.engine.graph_spec import BATCH


@pytest.mark.parametrize("strip_tiles", [4, 1000], ids=["strips", "whole"])
@pytest.mark.parametrize(
    ("kernel", "pads"),
    [(3, (1, 1, 1, 1)), (2, (1, 1, 0, 0)), (2, (0, 1, 1, 0)), (2, (0, 0, 1, 1))],
    ids=["3x3", "2x2-upper-left", "2x2-lower-left", "2x2-lower-right"],
)
def test_winograd_equals_a_convolution(kernel, pads, strip_tiles, monkeypatch):
    monkeypatch.setattr(winograd, "pays", lambda *sizes: True)
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 10, kernel, kernel, generator=rng) / kernel
    bias, x = torch.randn(6, generator=rng), torch.randn(2, 10, 16, 24, generator=rng)
    g = GraphBuilder("conv", replace(CPU, strip_tiles=strip_tiles))
    g.output("y", layers.conv(g, g.input("x", (BATCH, 10, 16, 24)), weight, bias, pads))
    graph = g.finish()
    top, left, bottom, right = pads
    want = F.conv2d(F.pad(x, (left, right, top, bottom)).double(), weight.double(), bias.double())
    assert relative_l2(run(graph, {"x": x.numpy()}), want.numpy()) < 5e-6
    points, tiles = (4 + kernel - 1) ** 2, 4 * 6
    # input transform, products and output transform; the kernels are transformed at export
    assert graph.macs == points * tiles * (points * 10 + 6 * 10 + 16 * 6)


@pytest.mark.parametrize("side", [64, 256], ids=["small-group", "large-group"])
@torch.inference_mode()
def test_group_norm_far_from_zero(side):
    """A mean of fifty standard deviations, over 8192 or 131,072 elements, costs no avoidable digits."""
    norm = random_network(nn.GroupNorm(2, 4, eps=1e-6), 1)
    x = 50 + torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(side))
    g = GraphBuilder("norm")
    g.output("y", layers.group_norm(g, g.input("x", (BATCH, 4, side, side)), norm))
    want = norm.double()(x.double()).numpy()
    assert relative_l2(run(g.finish(), {"x": x.numpy()}), want) < 5e-6


@pytest.mark.parametrize("eps", [1e-6, None], ids=["norm", "identity"])
@torch.inference_mode()
def test_norms_before_tiled_convolutions_are_applied_in_strips(eps, monkeypatch):
    """Scale, shift and SiLU are applied strip by strip."""
    monkeypatch.setattr(winograd, "pays", lambda *sizes: True)
    norm = random_network(nn.GroupNorm(2, 8, eps=eps) if eps else nn.Identity(), 1)
    conv = random_network(nn.Conv2d(8, 8, 3, padding=1), 2)
    x = torch.randn(2, 8, 24, 16, generator=torch.Generator().manual_seed(3))
    g = GraphBuilder("norm", replace(CPU, strip_tiles=8))
    g.output(
        "y",
        layers.conv_module(g, layers.normalised(g, g.input("x", (BATCH, *x.shape[1:])), norm, True), conv),
    )
    graph = g.finish()
    assert relative_l2(run(graph, {"x": x.numpy()}), conv(F.silu(norm(x))).numpy()) < 5e-6
    sizes = [
        graph.values[node.output[0]].size(2) for node in graph.model.graph.node if node.op_type == "Sigmoid"
    ]
    assert sizes == [9, 10, 9]


def test_macs_of_a_plain_convolution():
    g = GraphBuilder("conv")
    y = layers.conv(g, g.input("x", (BATCH, 8, 10, 10)), torch.zeros(16, 8, 3, 3), None)
    g.output("y", y)
    assert g.finish().macs == 16 * 8 * 9 * 100


@pytest.mark.parametrize("choices", [CPU, GPU], ids=["cpu", "gpu"])
@torch.inference_mode()
def test_upsampling_convolution_equals_upsampling_and_convolution(choices):
    """The kernels are summed in the graph for CPUs, and during the export for GPUs."""
    conv = random_network(nn.Conv2d(4, 6, 3, padding=1), 1)
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))
    g = GraphBuilder("up", choices)
    g.output("y", layers.upsample_conv(g, g.input("x", (BATCH, 4, 8, 12)), conv))
    want = conv(F.interpolate(x, scale_factor=2)).numpy()
    assert relative_l2(run(g.finish(), {"x": x.numpy()}), want) < 1e-6


@pytest.mark.parametrize(
    ("weight", "half"),
    [
        (torch.rand(64, 64, generator=torch.Generator().manual_seed(3)), True),
        (torch.rand(4, 4), False),
        (torch.rand(4096, generator=torch.Generator().manual_seed(3)), False),
        (torch.arange(2048.0), True),
        (torch.full((64, 64), 1e-7), False),
        (torch.full((64, 64), 1e6), False),
    ],
    ids=["matrix", "small", "vector", "exact-vector", "too-fine", "too-large"],
)
def test_constants_that_round_little_are_stored_in_half_precision(weight, half):
    g = GraphBuilder("store", replace(CPU, store="fp16"))
    g.output("y", g.op("Add", g.op("Add", g.input("x", (1,)), weight), weight))
    graph = g.finish()
    stored = [tensor.data_type == TensorProto.FLOAT16 for tensor in graph.model.graph.initializer]
    assert stored == [half] and [n.op_type for n in graph.model.graph.node].count("Cast") == half
    got = run(graph, {"x": np.zeros(1, np.float32)})
    assert relative_l2(got, 2 * weight.numpy()) < (3e-4 if half else 1e-7)


def test_output_shape_must_be_fixed():
    g = GraphBuilder("free")
    with pytest.raises(ValueError, match="which is not fixed"):
        g.output("y", g.op("NonZero", g.input("x", (BATCH, 3))))
