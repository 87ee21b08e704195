"""Graphs that give NaN or infinity run once more in float32, on every backend of a CPU."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engines import build_engine
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from moesr.runtime import NonFiniteError, Upscaler
from moesr.runtime.backends import selection
from moesr.runtime.cli.run import main
from moesr.runtime.engine import onnx_float32
from moesr.runtime.engine.graph_spec import Arrangement
from moesr.runtime.engine.manifest_file import read_manifest, write_manifest
from moesr.runtime.errors import EngineError
from moesr.runtime.system.files import sha256_of

ALL_BACKENDS = {"onnxruntime": "moesr.runtime.backends.ort", "openvino": "moesr.runtime.backends.ov"}
SIDE = 16
RNG = np.random.default_rng(5)
BRIGHT, DARK = RNG.integers(200, 256, (16, 16, 3), np.uint8), RNG.integers(10, 60, (16, 16, 3), np.uint8)


@pytest.fixture(params=ALL_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip(request.param)
    monkeypatch.setitem(selection.BACKENDS, request.param, ALL_BACKENDS[request.param])
    return request.param


def overflowing(kind: int = TensorProto.FLOAT16, *, external: Path | None = None) -> onnx.ModelProto:
    """eps = 0.9 z_t + cond, by way of half precision, which overflows for cond above 0.5.

    On a CPU, OpenVINO computes half precision as float32 throughout, and ONNX Runtime all but the Casts.
    """
    latent = ["B", 3, SIDE, SIDE]
    shift = numpy_helper.from_array(np.full((1,), 0.5, np.float16), "shift")
    if kind == TensorProto.BFLOAT16:
        shift = helper.make_tensor("shift", kind, [1], [0.5])
    if external:
        external.write_bytes(b"\0" * 8 + np.full((1,), 0.5, np.float16).tobytes())
        shift = TensorProto(name="shift", data_type=kind, dims=[1], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", external.name), ("offset", "8"), ("length", "2")):
            shift.external_data.add(key=key, value=value)
    values = {"gain": 0.9, "half": 0.5, "large": 1e6, "small": 1e-6}
    weights = [shift, *(numpy_helper.from_array(np.float32(v), name) for name, v in values.items())]
    constant = helper.make_tensor("value", kind, [1], [0.5])
    nodes = [
        helper.make_node("Sub", ["cond", "half"], ["above"]),
        helper.make_node("Relu", ["above"], ["bright"]),
        helper.make_node("Mul", ["bright", "large"], ["product"]),
        helper.make_node("Cast", ["product"], ["narrow"], to=kind),
        helper.make_node("Cast", ["narrow"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "small"], ["part"]),
        helper.make_node("Min", ["cond", "half"], ["rest"]),
        helper.make_node("Cast", ["rest"], ["rest_half"], to=kind),
        helper.make_node("Constant", [], ["same"], value=constant),
        helper.make_node("Sub", ["rest_half", "same"], ["lower"]),
        helper.make_node("Add", ["lower", "shift"], ["again"]),
        helper.make_node("Cast", ["again"], ["again_wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["z_t", "gain"], ["z_part"]),
        helper.make_node("Sum", ["z_part", "again_wide", "part"], ["eps"]),
    ]
    graph = helper.make_graph(
        nodes,
        "overflowing",
        [
            helper.make_tensor_value_info(n, 1, s)
            for n, s in (("z_t", latent), ("cond", latent), ("t", ["B"]))
        ],
        [helper.make_tensor_value_info("eps", 1, latent)],
        weights,
        value_info=[helper.make_tensor_value_info("narrow", kind, latent)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def engine_of(directory: Path, model: onnx.ModelProto, precision: str = "fp16", **entries: Any) -> Path:
    """A synthetic engine whose expert_0 is this graph."""
    build_engine(directory, **entries)
    path = directory / "expert_0.onnx"
    path.write_bytes(model.SerializeToString())
    manifest = read_manifest(directory, verify=False)
    graph = replace(manifest.graphs["expert_0"], sha256=sha256_of(path), precision=precision)
    write_manifest(replace(manifest, graphs={**manifest.graphs, "expert_0": graph}), directory)
    return directory


def test_an_overflow_runs_again_in_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "moesr")
    engine = engine_of(tmp_path / "half", overflowing())
    wide = onnx.load_from_string(onnx_float32.derive(engine / "expert_0.onnx"))
    with Upscaler(engine_of(tmp_path / "wide", wide, "fp32")) as up:
        want, plain = up(BRIGHT, color_fix="none"), up(DARK, color_fix="none")
    assert not caplog.messages
    with Upscaler(engine, max_batch=2) as up:
        bright, dark = up.map([BRIGHT, DARK], color_fix="none")  # in one batch
    np.testing.assert_array_equal(bright, want)
    np.testing.assert_allclose(dark.astype(int), plain, atol=1)
    (warning,) = caplog.messages
    assert "expert_0.onnx: NaN or infinite values" in warning and "once more in float32" in warning


def test_bfloat16_and_external_weights(tmp_path: Path):
    """bfloat16 has no kernels in ONNX Runtime; its float32 form runs."""
    import onnxruntime as ort

    external = tmp_path / "w.bin"
    models = [overflowing(TensorProto.BFLOAT16), overflowing(external=external)]
    row = {
        "z_t": np.zeros((1, 3, SIDE, SIDE), np.float32),
        "cond": np.full((1, 3, SIDE, SIDE), 0.75, np.float32),
    }
    for number, model in enumerate(models):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        derived = onnx.load_from_string(onnx_float32.derive(path))
        types = {t.data_type for t in derived.graph.initializer} | {
            a.i for node in derived.graph.node for a in node.attribute if a.name == "to"
        }
        assert TensorProto.FLOAT in types and not derived.graph.value_info
        assert not any(t.external_data for t in derived.graph.initializer)
        session = ort.InferenceSession(derived.SerializeToString(), providers=["CPUExecutionProvider"])
        fed = {i.name: row.get(i.name, np.zeros(1, np.float32)) for i in session.get_inputs()}
        (eps,) = session.run(None, fed)
        np.testing.assert_allclose(eps, 0.75, atol=1e-3)


def test_activations_are_not_quantized_in_float32(
    tmp_path: Path, backend: str, caplog: pytest.LogCaptureFixture
):
    """A scale of infinity makes 8-bit activations infinite; the float32 form leaves the pair out."""
    latent = ["B", 3, SIDE, SIDE]
    weights = [
        numpy_helper.from_array(np.array(0.01, np.float32), "scale"),
        numpy_helper.from_array(np.array(np.inf, np.float32), "wrong"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
        numpy_helper.from_array(np.array([[[[2]]], [[[2]]], [[[2]]]], np.int8), "kernel"),
        numpy_helper.from_array(np.array(0.25, np.float32), "step"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["cond", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "wrong", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["kernel", "step", "zero"], ["w"]),
        helper.make_node("Conv", ["d", "w"], ["c"], group=3),
        helper.make_node("Mul", ["z_t", "step"], ["z"]),
        helper.make_node("Add", ["z", "c"], ["eps"]),
    ]
    graph = helper.make_graph(
        nodes,
        "int8",
        [
            helper.make_tensor_value_info(n, 1, s)
            for n, s in (("z_t", latent), ("cond", latent), ("t", ["B"]))
        ],
        [helper.make_tensor_value_info("eps", 1, latent)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    engine = engine_of(tmp_path, model, "int8", experts=1, steps=1)
    derived = onnx.load_from_string(onnx_float32.derive(engine / "expert_0.onnx"))
    assert [n.op_type for n in derived.graph.node][:3] == ["QuantizeLinear", "Identity", "DequantizeLinear"]
    with Upscaler(engine, backend=backend) as up:
        assert np.ptp(up(DARK, color_fix="none")) > 0
    assert "once more in float32" in caplog.text


def test_the_engines_own_float32_variant_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(tmp_path, overflowing())
    (engine / "plain.onnx").write_bytes(onnx_float32.derive(engine / "expert_0.onnx"))
    manifest = read_manifest(engine)
    variant = Arrangement("plain.onnx", sha256_of(engine / "plain.onnx"), "fp32")
    graph = replace(manifest.graphs["expert_0"], variants={"gpu": variant})
    write_manifest(replace(manifest, graphs={**manifest.graphs, "expert_0": graph}), engine)
    monkeypatch.setattr(onnx_float32, "derive", lambda path: pytest.fail(f"{path} was derived"))
    with Upscaler(engine) as up:
        assert up(BRIGHT).std() > 0


def test_a_second_failure_ends_one_image_alone(tmp_path: Path):
    """A factor that is too large for float32 fails twice, and only bright tiles meet it."""
    model = overflowing()
    model.graph.initializer[3].CopyFrom(numpy_helper.from_array(np.float32(3e38), "large"))
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.float32(-0.9), "half"))
    model.graph.initializer[4].CopyFrom(numpy_helper.from_array(np.float32(1e-38), "small"))
    with Upscaler(engine_of(tmp_path, model), max_batch=2) as up:
        bad, good = up.map([BRIGHT, DARK], return_errors=True)
    assert isinstance(bad, NonFiniteError)
    assert re.search(r"expert_0\.onnx.*a second run in float32 did not help", str(bad))
    assert good.std() > 0


def test_the_report_names_the_second_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    engine, log = engine_of(tmp_path / "engine", overflowing()), tmp_path / "log.jsonl"
    for name, pixels in (("a_dark", DARK), ("b_bright", BRIGHT), ("c_dark", DARK)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    given = ["--engine", str(engine), "--backend", "onnxruntime", "--log", str(log)]
    inputs = [str(tmp_path / f"{name}.png") for name in ("a_dark", "b_bright", "c_dark")]
    assert main([*inputs, "-o", str(tmp_path / "out/"), *given]) == 0
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [len(row["warnings"]) for row in rows] == [0, 1, 0]
    assert "once more in float32" in rows[1]["warnings"][0]
    assert capsys.readouterr().err.count("once more in float32") == 1


@pytest.mark.parametrize("data", [b"", b"\x3a\xff\xff\xff\xff\x0f", b"\x3f", b"\x38\x01", b"\xff" * 12])
def test_damaged_files_are_refused(tmp_path: Path, data: bytes):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(data)
    if data:
        with pytest.raises(EngineError, match="no float32 graph can be derived"):
            onnx_float32.derive(path)
    with pytest.raises(EngineError, match="cannot be read"):
        onnx_float32.derive(tmp_path / "missing.onnx")
