"""The time of a graph is split up by the profilers of ONNX Runtime and OpenVINO."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import random_network
from ladder import profiles
from torch import nn

from moesr.export.graphs.builder import GraphBuilder
from moesr.export.graphs.layers import conv_module
from moesr.export.lowering import GPU
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.engine.graph_spec import BATCH


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_profile_lists_time_by_module_and_operator(library, tmp_path):
    pytest.importorskip(library)
    g = GraphBuilder("two", GPU)
    h = g.input("x", (BATCH, 8, 32, 32))
    for name in ("first", "second"):
        with g.scope(name):
            h = conv_module(g, h, random_network(nn.Conv2d(8, 8, 3, padding=1), 1))
    g.output("y", h)
    path, values = tmp_path / "two.onnx", {"x": np.ones((1, 8, 32, 32), np.float32), "other": np.ones(1)}
    path.write_bytes(g.finish().to_bytes())
    if library == "openvino":
        found = profiles.openvino_profile(path, values, SessionOptions(threads=1))
    else:
        found = profiles.onnxruntime_profile(path, values, 1)
    assert "first" in found["modules"]  # an optimizer may name the last node after the output
    assert any(name.startswith("Conv") for name in found["operators"])
    for group in found.values():
        assert min(group.values()) >= 0 < sum(group.values())
        assert list(group.values()) == sorted(group.values(), reverse=True)
