"""OpenVINO compared with ONNX Runtime: results, buffers, batches, threads, precision, cache, errors."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import relative_l2
from engines import build_engine, expert_graph
from onnx import helper
from PIL import Image

from moesr.runtime import EngineError, Upscaler, UsageError
from moesr.runtime.backends import ort, ov
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends.selection import BACKENDS, Backend, candidates
from moesr.runtime.cli.run import main
from moesr.runtime.devices.interface import Session
from moesr.runtime.engine.graph_spec import Arrangement, Boundary, Graph
from moesr.runtime.engine.locate import engine_directory
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.loop.graph_memory import GraphMemory, _activation_bytes

pytest.importorskip("openvino")

RNG = np.random.default_rng(5)
DEMO = engine_directory(Path("demo-x4"))
FLOAT32, BFLOAT16 = 1e-5, 1e-2  # largest relative L2 difference of a step from that of ONNX Runtime
needs_bf16 = pytest.mark.skipif("bf16" not in ov.probe().precisions, reason="this CPU has no bfloat16")


@pytest.fixture(autouse=True)
def available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "onnxruntime", "moesr.runtime.backends.ort")
    monkeypatch.setitem(BACKENDS, "openvino", "moesr.runtime.backends.ov")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield build_engine(tmp_path_factory.mktemp("engine"))


def backend(name: str = "openvino", max_batch: int = 1, **options: object) -> Backend:
    traits = {"openvino": ov.TRAITS, "onnxruntime": ort.TRAITS}[name]
    return Backend(name, SessionOptions(**options), max_batch, traits=traits)  # type: ignore[arg-type]


def step(directory: Path, way: Backend, tiles: int = 1, role: str = "expert_0") -> np.ndarray:
    """Run a graph of an engine on `tiles` seeded tiles and return its output."""
    return run(way.open(directory, read_manifest(directory).graphs[role]), tiles)


def run(session: Session, tiles: int = 1) -> np.ndarray:
    """Run a session on `tiles` seeded tiles, in buffers for one tile more, and close it."""
    rng = np.random.default_rng(0)
    inputs, outputs = session.boundary.inputs, session.boundary.outputs
    buffers = {s.name: rng.standard_normal(s.shape(tiles + 1)).astype(np.float32) for s in inputs}
    buffers |= {s.name: np.full(s.shape(tiles + 1), np.nan, np.float32) for s in outputs}
    session.bind(buffers, tiles + 1)
    session.enqueue(tiles)
    result = buffers[outputs[0].name]
    assert np.isnan(result[tiles:]).all()
    session.close()
    return result[:tiles]


@pytest.mark.parametrize("role", ["expert_0", "decoder"])
def test_graphs_agree_with_onnxruntime(engine: Path, role: str):
    want = step(engine, backend("onnxruntime"), 2, role)
    assert relative_l2(step(engine, backend(), 2, role), want) < FLOAT32


def test_bundled_expert_agrees_with_onnxruntime():
    assert relative_l2(step(DEMO, backend()), step(DEMO, backend("onnxruntime"))) < FLOAT32


def test_external_weights(tmp_path: Path):
    graph = read_manifest(DEMO).graphs["expert_0"]
    model = onnx.load(DEMO / graph.file)
    onnx.save(model, tmp_path / graph.file, save_as_external_data=True, location="weights", size_threshold=0)
    got = run(ov.open_session(tmp_path / graph.file, graph.boundary, SessionOptions()))
    np.testing.assert_array_equal(got, step(DEMO, backend()))


def test_bundled_engine_agrees_with_onnxruntime():
    lr = RNG.integers(0, 256, (24, 30, 3), np.uint8)
    with Upscaler("demo-x4", backend="onnxruntime") as up:
        want = up(lr, steps=2)
    with Upscaler("demo-x4", backend="openvino", threads=1) as up:
        got = up(lr, steps=2)
    difference = np.abs(got.astype(int) - want)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 2e-3


def test_batch_does_not_change_results(engine: Path):
    lr = RNG.integers(0, 256, (40, 50, 3), np.uint8)  # several tiles per run
    results = []
    for max_batch in (1, 3):
        with Upscaler(engine, backend="openvino", max_batch=max_batch) as up:
            results.append(up(lr, steps=3))
    np.testing.assert_array_equal(*results)


def test_one_fidelity_for_the_whole_run(tmp_path: Path):
    """A graph of schema 1 has one fidelity for all tiles of a run."""
    graph = read_manifest(build_engine(tmp_path)).graphs["decoder"]
    model = onnx.load(tmp_path / graph.file)
    model.graph.input[2].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    inputs = tuple(replace(s, dims=(1,)) if s.name == "fidelity" else s for s in graph.inputs)
    session = ov.open_session(tmp_path / "one.onnx", Boundary(inputs, graph.outputs), SessionOptions())
    buffers = {s.name: np.ones(s.shape(2), np.float32) for s in (*inputs, *graph.outputs)}
    buffers["fidelity"][...] = 0.5
    session.bind(buffers, 2)
    session.enqueue(2)
    np.testing.assert_allclose(buffers["image"], 0.55, rtol=1e-6)


def test_number_of_threads_is_the_option(monkeypatch: pytest.MonkeyPatch):
    assert ov.properties(SessionOptions(threads=1))["INFERENCE_NUM_THREADS"] == 1
    assert "INFERENCE_NUM_THREADS" not in ov.properties(SessionOptions())
    one, two = (step(DEMO, backend(threads=threads)) for threads in (1, 2))
    assert relative_l2(one, two) < FLOAT32


@needs_bf16
def test_bfloat16_only_on_request():
    exact, coarse = step(DEMO, backend()), step(DEMO, backend(precision="bf16"))
    assert FLOAT32 < relative_l2(coarse, exact) < BFLOAT16


def test_unsupported_precision():
    with pytest.raises(EngineError, match=r"onnxruntime .* cannot compute in bf16 here, only as: graph"):
        candidates("onnxruntime", precision="bf16")
    with pytest.raises(UsageError, match="precision is 'int8', expected one of graph, bf16, auto"):
        candidates(precision="int8")


def test_compiled_graphs_are_cached(tmp_path: Path, engine: Path, monkeypatch: pytest.MonkeyPatch):
    """A graph is compiled once, and again without an error if its cached file is damaged."""
    compiled, compile_ = [], ov._compile
    monkeypatch.setattr(ov, "_compile", lambda *a: compiled.append(1) or compile_(*a))
    way = backend(cache=tmp_path / "new")
    first = step(engine, way)
    for damage, times in ((None, 1), (lambda data: data[:100], 2), (lambda data: bytes(len(data)), 3)):
        for blob in (tmp_path / "new").rglob("*.blob"):
            if damage:
                blob.write_bytes(damage(blob.read_bytes()))
        np.testing.assert_array_equal(step(engine, way), first)
        assert len(compiled) == times
    with pytest.raises(EngineError, match="export the engine again"):
        graph = read_manifest(engine).graphs["expert_0"]
        way.open(engine, replace(graph, inputs=graph.inputs[:1]))


def test_cached_graph_that_does_not_load_is_compiled_again(
    tmp_path: Path, engine: Path, monkeypatch: pytest.MonkeyPatch
):
    first = step(engine, backend(cache=tmp_path / "new"))
    (blob,) = (tmp_path / "new").rglob("*.blob")
    monkeypatch.setattr(
        ov.graph_cache, "find", lambda *_, verify=True: blob.parent if blob.exists() else None
    )
    blob.write_bytes(b"nothing that loads")
    np.testing.assert_array_equal(step(engine, backend(cache=tmp_path / "new")), first)


def test_command_line(tmp_path: Path, engine: Path, capsys: pytest.CaptureFixture[str]):
    Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    options = ["--engine", str(engine), "--backend", "openvino", "--cache", str(tmp_path / "cache")]
    assert main([str(tmp_path / "a.png"), "--steps", "1", *options]) == 0
    assert "backend openvino 20" in capsys.readouterr().err
    assert (tmp_path / "a_x4.png").exists() and list((tmp_path / "cache").rglob("*.blob"))
    assert main([str(tmp_path / "a.png"), "--backend", "onnxruntime", "--precision", "bf16"]) == 3


def test_working_memory_of_all_sessions_is_counted(engine: Path):
    manifest = read_manifest(engine)
    shared, apart = (
        GraphMemory(manifest, engine, "cpu", 1, shared=way.shares_memory)
        for way in (backend("onnxruntime"), backend())
    )
    work = [_activation_bytes(manifest, role) for role in manifest.graphs]
    assert apart.work_of(1) - shared.work_of(1) == sum(work) - max(work)


def test_cache_directory_that_cannot_be_written(
    tmp_path: Path, engine: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO, "moesr"):
        step(engine, backend(cache=tmp_path / "file" / "below"))
    assert "is not cached" in caplog.text


def test_variant_of_the_same_precision_is_opened(tmp_path: Path):
    """The variant adds 5 to its results, so that they show which of the two files was opened."""
    build_engine(tmp_path)
    onnx.save(expert_graph(16, shift=5.0), tmp_path / "plain.onnx")
    plain = Arrangement("plain.onnx", "", "fp32")
    graph = replace(read_manifest(tmp_path).graphs["expert_0"], variants={"gpu": plain})
    half = replace(graph, variants={"gpu": replace(plain, precision="fp16")})
    assert _first_value(tmp_path, backend(), graph) == pytest.approx(5.0)
    assert _first_value(tmp_path, backend(), half) == pytest.approx(0.0)
    assert _first_value(tmp_path, backend("onnxruntime"), graph) == pytest.approx(0.0)


def _first_value(directory: Path, way: Backend, graph: Graph) -> float:
    """Return the first value of a graph's output if all its inputs are zero."""
    session = way.open(directory, graph)
    specs = (*session.boundary.inputs, *session.boundary.outputs)
    buffers = {s.name: np.zeros(s.shape(1), np.float32) for s in specs}
    session.bind(buffers, 1)
    session.enqueue(1)
    return float(buffers["eps"].flat[0])


def test_graph_with_another_boundary_is_refused(engine: Path):
    graph = read_manifest(engine).graphs["expert_0"]
    wider = tuple(replace(s, dims=("B", 3, 32, 32)) if s.name == "cond" else s for s in graph.inputs)
    with pytest.raises(EngineError, match=r"cond float32 \[\?, 3, 16, 16\].* export the engine again"):
        ov.open_session(engine / graph.file, Boundary(wider, graph.outputs), SessionOptions())


def test_unsupported_graph_is_refused_with_the_cure(tmp_path: Path, engine: Path):
    graph = read_manifest(engine).graphs["expert_0"]
    model = onnx.load(engine / graph.file)
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, tmp_path / "foreign.onnx")
    (tmp_path / "garbage.onnx").write_bytes(b"not a graph")
    cures = {
        "foreign.onnx": "openvino cannot run it .* choose --backend onnxruntime",
        "garbage.onnx": "not an ONNX file .*; export the engine again",
        "absent.onnx": "cannot be read",
    }
    for name, cure in cures.items():
        with pytest.raises(EngineError, match=rf"{name}: {cure}"):
            ov.open_session(tmp_path / name, graph.boundary, SessionOptions())


def test_abort_ends_the_current_run():
    graph = read_manifest(DEMO).graphs["expert_0"]
    session = backend(threads=1).open(DEMO, graph)
    specs = (*session.boundary.inputs, *session.boundary.outputs)
    session.bind({s.name: np.zeros(s.shape(1), np.float32) for s in specs}, 1)
    ran, errors = threading.Event(), []

    def run() -> None:
        try:
            while True:
                session.enqueue(1)
                ran.set()
        except EngineError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert ran.wait(60)
    session.abort()
    thread.join(60)
    assert len(errors) == 1 and "the run was aborted" in errors[0]
    with pytest.raises(EngineError, match="the run was aborted"):
        session.enqueue(1)
    session.close()
    session.abort()  # to abort a closed session has no effect


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"pip install 'moesr\[openvino\]'"):
        candidates("openvino")
    assert [b.label for b in candidates(precision="auto")] == ["onnxruntime"]
