"""Engines in bf16 are checked by float32 twins of their graphs that round to bfloat16.

The graphs for CPUs are float32, and a backend may compute them in bfloat16. Those for GPUs are bfloat16.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import relative_l2
from graphs import decoder_inputs, expert_inputs, random_decoder, random_expert, run, write_checkpoint

from moesr.export import bfloat16, cli, parity, tensorrt
from moesr.export.graphs.builder import GraphBuilder
from moesr.export.lowering import lowering
from moesr.kernels import plan
from moesr.runtime import Upscaler
from moesr.runtime.backends import autotune, selection
from moesr.runtime.backends.selection import BACKENDS
from moesr.runtime.backends.tensorrt import library
from moesr.runtime.cli import doctor
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError

TILE, LATENT = 32, 8
BF16 = lowering("cpu", "bf16")


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    directory = tmp_path_factory.mktemp("engine") / "bf16"
    assert cli.main([str(checkpoint), "--bf16", "-o", str(directory), "--tile", str(TILE), "--quiet"]) == 0
    return directory


def test_manifest_describes_a_bf16_engine(engine):
    manifest = read_manifest(engine)
    assert manifest.precision == "bf16"
    for graph in manifest.graphs.values():
        assert graph.stored == "fp16" and graph.parity
        assert 5e-4 < graph.parity.relative_l2 < graph.parity.threshold == parity.THRESHOLDS["bf16", "fp16"]


def test_float32_backends_have_only_the_rounding_error_of_storage(engine):
    """Weights are stored in half precision, which has three more bits than bfloat16 at the same size."""
    inputs = expert_inputs(2, LATENT)
    got = run(engine / "expert_1.onnx", inputs)
    assert 1e-5 < relative_l2(got, parity.network_output(random_expert(1), inputs)) < 1e-3


def test_twin_rounds_inputs_and_results_of_products():
    g = GraphBuilder("product", BF16)
    x = g.input("x", ("B", 2, 4, 4))
    weight = np.full((1, 2, 1, 1), 1 + 2.0**-9, np.float32)
    g.output("y", g.op("Conv", g.op("Add", x, np.float32(1.0)), weight, None))
    built = g.finish()
    x = np.full((1, 2, 4, 4), 2.0**-9, np.float32)
    assert run(built, {"x": x})[0, 0, 0, 0] == pytest.approx(2 * (1 + 2.0**-9) ** 2, rel=1e-6)
    twin = parity.outputs(bfloat16.as_bf16(built.model).SerializeToString(), {"x": x})[0]
    assert twin[0, 0, 0, 0] == 2.0  # 1 + 2**-9 is rounded, since it has more bits than bfloat16


def test_twin_does_not_round_before_the_first_product(engine):
    """Rounding would change the angles of the timestep embedding by whole turns."""
    twin = bfloat16.as_bf16(onnx.load(engine / "expert_0.onnx"))
    angles = next(node for node in twin.graph.node if node.op_type == "Cos")
    sources = {node.output[0]: node.op_type for node in twin.graph.node}
    assert sources[angles.input[0]] == "Mul"


def test_error_of_the_twin_is_close_to_that_of_openvino(engine):
    ov = pytest.importorskip("openvino")
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    inputs, path = expert_inputs(1, LATENT), engine / "expert_0.onnx"
    model = ov.Core().read_model(path)
    model.reshape({name: list(value.shape) for name, value in inputs.items()})
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    want = run(path, inputs)
    true = relative_l2(next(iter(compiled(inputs).values())), want)
    twin = bfloat16.as_bf16(onnx.load(path)).SerializeToString()
    assert 0.3 < relative_l2(parity.outputs(twin, inputs)[0], want) / true < 3


def test_precision_auto_runs_the_faster_of_float32_and_bfloat16(engine, monkeypatch):
    """bfloat16 is allowed because the engine was exported with --bf16."""
    asked = []

    def choose(found, *_):
        asked.extend(backend.options.precision for backend in found)
        return found[0], None

    monkeypatch.setitem(BACKENDS, "openvino", "moesr.runtime.backends.ov")
    openvino = selection.probe("openvino")
    monkeypatch.setattr(autotune, "choose", choose)
    with Upscaler(engine, device="cpu"):
        assert asked == [None, None, *openvino.precisions]


def test_autotune_accepts_the_error_bound_of_the_parity_check(engine, monkeypatch):
    """A graph whose parity threshold is 5e-2 is not refused for an error of 2e-2."""
    monkeypatch.setitem(BACKENDS, "openvino", "moesr.runtime.backends.ov")
    found = selection.candidates(device="cpu", threads=1)
    results = iter([(1.0, np.ones(4, np.float32)), (0.5, np.full(4, 1.02, np.float32))])
    monkeypatch.setattr(autotune, "_time_step", lambda *_: next(results))
    monkeypatch.setattr(autotune, "_recall", lambda *_: None)
    assert autotune.choose(found, engine, read_manifest(engine))[0].name == "openvino"


def test_runtime_and_doctor_accept_the_engine(engine, capsys):
    image = np.random.default_rng(5).integers(0, 256, (12, 10, 3), np.uint8)
    with Upscaler(engine, device="cpu") as up:
        assert up(image, steps=2, seed=0).shape == (48, 40, 3)
    assert doctor.main(["--engine", str(engine)]) == 0
    assert "(its bf16 graphs in float32)" in capsys.readouterr().out


# Graphs for GPUs, whose values are bfloat16.


@pytest.fixture(scope="module")
def typed(tmp_path_factory) -> Path:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    directory = tmp_path_factory.mktemp("engine") / "typed"
    flags = "--bf16", "--target", "gpu", "--tile", str(TILE), "--quiet"
    assert cli.main([str(checkpoint), "-o", str(directory), *flags]) == 0
    return directory


def test_parity_of_bfloat16_graphs_is_checked(typed, engine):
    for role, graph in read_manifest(typed).graphs.items():
        assert (graph.precision, graph.stored) == ("bf16", None) and graph.parity
        assert 1e-3 < graph.parity.relative_l2 < graph.parity.threshold == parity.THRESHOLDS["bf16", "bf16"]
        large = [
            t.data_type
            for t in onnx.load(typed / f"{role}.onnx").graph.initializer
            if math.prod(t.dims) > 999
        ]
        assert large.count(onnx.TensorProto.BFLOAT16) > 0.8 * len(large)
    sizes = [(directory / "expert_0.onnx").stat().st_size for directory in (typed, engine)]
    assert sizes[0] < 1.1 * sizes[1]  # the other engine is stored in half precision


def test_target_both_holds_float32_and_bfloat16_graphs(tmp_path):
    checkpoint, engine = write_checkpoint(tmp_path / "tiny"), tmp_path / "engine"
    flags = "--bf16", "--target", "both", "--tile", str(TILE), "--quiet"
    assert cli.main([str(checkpoint), "-o", str(engine), *flags]) == 0
    manifest = read_manifest(engine)
    assert manifest.precision == "fp32"
    assert manifest.versions["opset"] == "22"
    assert {graph.variants["gpu"].precision for graph in manifest.graphs.values()} == {"bf16"}


def test_twin_of_a_bfloat16_graph_rounds_the_result_of_every_node():
    g = GraphBuilder("sums", lowering("gpu", "bf16"))
    x = g.compute(g.input("x", ("B", 2)))
    total = g.op("Add", x, np.float32(1.0))
    g.output("y", g.op("Sub", g.float32(g.op("Concat", total, x, axis=1)), np.float32(1.0)))
    twin = bfloat16.without_bf16(g.finish().model)
    types = {value.data_type for value in twin.graph.initializer}
    assert types == {onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT}
    x = np.array([[2.0**-9, 2.0**-7]], np.float32)
    got = parity.outputs(twin.SerializeToString(), {"x": x})[0]
    np.testing.assert_array_equal(got, [[0.0, 2.0**-7, 2.0**-9 - 1, 2.0**-7 - 1]])


def test_twin_of_a_float32_graph_is_unchanged(engine):
    model = onnx.load(engine / "expert_0.onnx")
    assert bfloat16.without_bf16(model) == model


@pytest.mark.parametrize("role", ["expert_0", "decoder"])
def test_openvino_agrees_with_the_twin_of_a_bfloat16_graph(typed, role):
    """ONNX's reference evaluator, which rounds less often, agrees too."""
    ov = pytest.importorskip("openvino")
    decoder = random_decoder()
    inputs = expert_inputs(1, LATENT) if role == "expert_0" else decoder_inputs(decoder, [1.0], TILE)
    model = ov.Core().read_model(typed / f"{role}.onnx")
    model.reshape({name: list(value.shape) for name, value in inputs.items()})
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = next(iter(compiled(inputs).values()))
    twin = bfloat16.without_bf16(onnx.load(typed / f"{role}.onnx")).SerializeToString()
    assert relative_l2(got, parity.outputs(twin, inputs)[0]) < parity.THRESHOLDS["bf16", "bf16"]


def test_backends_without_bfloat16_are_refused(typed):
    image = np.random.default_rng(5).integers(0, 256, (12, 10, 3), np.uint8)
    with (
        Upscaler(typed, backend="onnxruntime", device="cpu") as up,
        pytest.raises(EngineError, match=r"lacks a data type of this graph, such as bfloat16: use another"),
    ):
        up(image, steps=2)


def test_gpus_without_bfloat16_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "check_compiler", lambda: None)
    monkeypatch.setattr(tensorrt, "capabilities", lambda library, given: given)
    monkeypatch.setattr(library, "load", lambda flavour=None: None)
    flags = "--bf16", "--tensorrt", "--capability", "8.9", "7.5"
    assert cli.main([*flags, "-o", str(tmp_path / "engine")]) == 2
    assert "capability 8.0 or later, not 7.5; export with --fp16" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()
