"""ONNX Runtime on a GPU, tested without one: refused graphs, bindings to addresses, provider settings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from cuda_simulation import SimulatedDriver, lock_is_held
from engines import build_engine

from moesr.runtime.backends import ort as backend
from moesr.runtime.backends import ort_cuda, selection
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends.ort import session_options
from moesr.runtime.engine.graph_spec import Boundary
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError, MemoryLimitError


@pytest.fixture
def graph(tmp_path: Path) -> tuple[Path, Boundary]:
    manifest = read_manifest(build_engine(tmp_path / "engine"))
    return tmp_path / "engine" / "decoder.onnx", manifest.graphs["decoder"].boundary


def opened(path: Path) -> ort.InferenceSession:
    settings = session_options(1)
    ort_cuda.prepare(settings)
    return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def test_graphs_with_nodes_off_the_gpu_are_refused(graph):
    session = opened(graph[0])
    ort_cuda.check_assignment(session, graph[0], "CPUExecutionProvider")
    with pytest.raises(EngineError, match=r"part of it elsewhere \(.*1 Resize on CPU.*--target gpu"):
        ort_cuda.check_assignment(session, graph[0])


def test_runs_use_the_addresses_of_buffers(graph):
    """The library's CPU provider replaces the GPU, so device addresses are those of arrays."""
    path, boundary = graph
    session = ort_cuda.CudaOnnxSession(ort, opened(path), path, boundary, ("cpu", 0))
    rng = np.random.default_rng(1)
    arrays = {s.name: rng.random(s.shape(3), np.float32) for s in (*boundary.inputs, *boundary.outputs)}
    driver = SimulatedDriver()
    buffers = {n: SimpleNamespace(address=a.ctypes.data, driver=driver) for n, a in arrays.items()}
    session.bind(buffers, 3)
    for batch in (2, 3):
        arrays["image"][:] = np.nan
        session.enqueue(batch)
        z = arrays["z"].repeat(4, axis=2).repeat(4, axis=3)
        want = arrays["fidelity"][:, None, None, None] * arrays["lr"] + 0.05 * z
        np.testing.assert_allclose(arrays["image"][:batch], want[:batch], rtol=1e-5)
        assert np.isnan(arrays["image"][batch:]).all()
    assert not session.capturable
    session.abort()
    with pytest.raises(EngineError, match="aborted or closed; open the engine again"):
        session.enqueue(1)
    late = []
    driver.library_call("run", lambda: late.append(1))
    session.close()
    assert late  # `close` has waited for the run


def test_provider_settings():
    _, settings = ort_cuda.provider(SessionOptions("cuda:1", stream=4711))
    assert settings["device_id"] == "1" and settings["user_compute_stream"] == "4711"
    assert settings["enable_cuda_graph"] == settings["prefer_nhwc"] == "1"
    _, eager = ort_cuda.provider(SessionOptions("cuda", cuda_graphs=False))
    assert "enable_cuda_graph" not in eager and "user_compute_stream" not in eager


def test_cuda_without_a_gpu_says_what_is_missing():
    backend = selection.Backend("onnxruntime", SessionOptions("cuda:99"), 4)
    with pytest.raises(EngineError, match=r"no GPU cuda:99 .*nvidia-smi|cuda-core does not load"):
        backend.device()


def test_old_onnxruntime_without_node_report_is_refused():
    with pytest.raises(EngineError, match=r"does not report where .*1\.24 and later"):
        ort_cuda.check_assignment(SimpleNamespace(), Path("expert.onnx"))


class StandIn:
    """A session whose runs fail, or only record whether the capture lock is held."""

    def __init__(self, error: str = "") -> None:
        self.error, self.guarded = error, []

    def io_binding(self) -> SimpleNamespace:
        return SimpleNamespace(bind_input=lambda *a: None, bind_output=lambda *a: None)

    def run_with_iobinding(self, binding: object, options: object) -> None:
        self.guarded.append(lock_is_held())
        if self.error:
            raise RuntimeError(self.error)


def bound(graph: tuple[Path, Boundary], library: StandIn) -> ort_cuda.CudaOnnxSession:
    session = ort_cuda.CudaOnnxSession(ort, library, *graph, ("cuda", 0))
    specs, driver = (*graph[1].inputs, *graph[1].outputs), SimulatedDriver()
    session.bind({s.name: SimpleNamespace(address=256, driver=driver) for s in specs}, 2)
    return session


def test_first_run_and_opening_hold_the_capture_lock(graph):
    """The library captures the first run of each batch size in CUDA's global mode, which needs the lock."""
    library = StandIn()
    session = bound(graph, library)
    for batch in (1, 1, 2, 1, 2):
        session.enqueue(batch)
    assert library.guarded == [True, False, True, False, False]
    assert not lock_is_held()


@pytest.mark.parametrize(
    ("text", "kind"),
    [("CUDA failure 2: out of memory", MemoryLimitError), ("CUDNN_STATUS_BAD_PARAM", EngineError)],
)
def test_failed_runs_name_the_lack_of_memory(graph, text, kind):
    session = bound(graph, StandIn(text))
    with pytest.raises(kind, match=text):
        session.enqueue(1)
    assert not lock_is_held()


def test_library_and_runtime_refuse_nodes_off_the_gpu_alike(graph, monkeypatch):
    """The library itself refuses such a graph if CUDA graphs are on."""
    path, boundary = graph
    refusal = (
        "This session cannot use the graph capture feature as requested by the user as all compute graph "
        "nodes have not been partitioned to the CUDAExecutionProvider"
    )

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(refusal)

    monkeypatch.setattr(backend, "_session", refuse)
    with pytest.raises(EngineError, match=r"part of it elsewhere .*--target gpu"):
        backend.open_session(path, boundary, SessionOptions("cuda"))


def test_libraries_are_loaded_before_a_gpu_session(graph, monkeypatch, capsys, caplog):
    events = []

    def preload() -> None:
        print("Failed to load libcudnn.so.9")
        events.append("preload")

    def session(*_: object, **__: object) -> None:
        events.append("session")
        raise RuntimeError("no GPU")

    caplog.set_level("INFO", "moesr")
    monkeypatch.setattr(ort, "preload_dlls", preload)
    monkeypatch.setattr(ort, "InferenceSession", session)
    backend._share_arena(ort, backend.session_options())
    events.clear()
    with pytest.raises(EngineError, match="no GPU"):
        backend.open_session(*graph, SessionOptions("cuda"))
    assert events == ["preload", "session"]
    assert capsys.readouterr().out == "" and "Failed to load libcudnn" in caplog.text


def test_library_errors_are_not_printed(graph, capsys):
    path, boundary = graph
    path.write_bytes(path.read_bytes().replace(b"Reshape", b"Resh\x8ape"))
    with pytest.raises(EngineError, match="onnxruntime cannot run it"):
        backend.open_session(path, boundary, SessionOptions())
    assert capsys.readouterr().out == ""


def test_extra_installs_what_the_provider_loads():
    """The provider needs cuBLAS, cuDNN, the CUDA runtime, cuFFT and cuRAND; from 1.28 replays do not wait."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    (needed,) = [line for line in project["optional-dependencies"]["cuda"] if "onnxruntime" in line]
    name, extras, floor = re.fullmatch(r"([\w-]+)\[([\w,]+)\]>=([\d.]+)", needed).groups()
    assert name == "onnxruntime-gpu" and extras.split(",") == ["cuda", "cudnn"]
    assert tuple(map(int, floor.split("."))) >= (1, 28)
