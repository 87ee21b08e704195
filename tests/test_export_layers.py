"""Layers as graph operators: Winograd convolution, GroupNorm, the count of multiply-accumulates."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_l2
from graphs import random_network, run
from torch import nn
from torch.nn import functional as F

from moesr.export import layers, winograd
from moesr.export.graph import BATCH, GraphBuilder


@pytest.mark.parametrize("strip_tiles", [4, 1000], ids=["strips", "whole"])
@pytest.mark.parametrize(
    ("kernel", "pads"),
    [(3, (1, 1, 1, 1)), (2, (1, 1, 0, 0)), (2, (0, 1, 1, 0)), (2, (0, 0, 1, 1))],
    ids=["3x3", "2x2-upper-left", "2x2-lower-left", "2x2-lower-right"],
)
def test_winograd_convolves(kernel, pads, strip_tiles, monkeypatch):
    monkeypatch.setattr(winograd, "pays", lambda *sizes: True)
    monkeypatch.setattr(winograd, "STRIP_TILES", strip_tiles)
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 10, kernel, kernel, generator=rng) / kernel
    bias, x = torch.randn(6, generator=rng), torch.randn(2, 10, 16, 24, generator=rng)
    g = GraphBuilder("conv")
    y = layers.conv(g, g.input("x", (BATCH, 10, 16, 24)), weight, bias, pads)
    g.output("y", y, (BATCH, 6, 16, 24))
    graph = g.finish()
    top, left, bottom, right = pads
    want = F.conv2d(F.pad(x, (left, right, top, bottom)).double(), weight.double(), bias.double())
    assert relative_l2(run(graph, {"x": x.numpy()}), want.numpy()) < 5e-6
    points, tiles = (4 + kernel - 1) ** 2, 4 * 6
    # input transform, products, output transform; that of the kernels is folded into constants
    assert graph.macs == points * tiles * (points * 10 + 6 * 10 + 16 * 6)


@pytest.mark.parametrize("side", [64, 256], ids=["small-group", "large-group"])
@torch.inference_mode()
def test_group_norm_far_from_zero(side):
    """A mean fifty times the deviation, over 8192 or 131,072 elements, costs no more digits than it must."""
    norm = random_network(nn.GroupNorm(2, 4, eps=1e-6), 1)
    x = 50 + torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(side))
    g = GraphBuilder("norm")
    g.output("y", layers.group_norm(g, g.input("x", (BATCH, 4, side, side)), norm), (BATCH, 4, side, side))
    want = norm.double()(x.double()).numpy()
    assert relative_l2(run(g.finish(), {"x": x.numpy()}), want) < 5e-6


def test_macs_of_a_plain_convolution():
    g = GraphBuilder("conv")
    y = layers.conv(g, g.input("x", (BATCH, 8, 10, 10)), torch.zeros(16, 8, 3, 3), None)
    g.output("y", y, (BATCH, 16, 10, 10))
    assert g.finish().macs == 16 * 8 * 9 * 100
