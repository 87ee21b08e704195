"""TensorRT: plans are built, cached, loaded or refused, and sessions run on a simulated GPU."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_simulation import SimulatedSession, simulated_device
from engines import build_engine
from engines import decoder_graph as small_graph
from fake_tensorrt import FakeEngine, fake_library
from graphs import random_decoder, random_expert
from rigs import FUNCTIONS, CudaRig, Rig, alike, eps_of

from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.expert import expert_graph
from moesr.export.graphs.kernel_call import KernelCall
from moesr.export.lowering import lowering
from moesr.export.partition import partition
from moesr.runtime.backends.tensorrt import backend, library, plan_store
from moesr.runtime.backends.tensorrt.backend import TensorRTSession, open_plan
from moesr.runtime.backends.tensorrt.plan_builder import build_plan
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError, MemoryLimitError
from moesr.runtime.system.files import sha256_of

KEY = plan_store.PlanKey("ab" * 32, "tensorrt_rtx", "9.9", 89, 4)
TILE = 32
HALF = ["fp16", "bf16"]


@pytest.fixture(scope="module")
def rtx() -> library.Library:
    try:
        return library.load("tensorrt_rtx")
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Write a graph file of an engine directory, with arbitrary content."""
    path = tmp_path / "engine" / "expert_0.onnx"
    path.parent.mkdir()
    path.write_bytes(b"graph")
    return path


# Plans of small networks, with the value layouts and the precision for a GPU.


PLANS = ["fp16", pytest.param("bf16", marks=pytest.mark.slow)]  # a build takes ten seconds or more


@pytest.mark.parametrize("precision", PLANS)
def test_expert_plan_builds_without_a_gpu(rtx, tmp_path, precision):
    path, shares = tmp_path / "expert.onnx", []
    path.write_bytes(expert_graph(random_expert(0), TILE // 4, lowering("gpu", precision)).to_bytes())
    plan = build_plan(rtx, path, 89, 4, workspace_bytes=1 << 28, on_progress=shares.append)
    assert len(plan) > 100_000
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 20


@pytest.mark.parametrize("precision", PLANS)
def test_plans_of_decoder_parts_build_without_a_gpu(rtx, tmp_path, precision):
    choices = replace(lowering("gpu", precision), kernels=True)
    for part in partition.cut(decoder_graph(random_decoder(), TILE // 8, choices)):
        if not isinstance(part, KernelCall):
            path = tmp_path / "part.onnx"
            path.write_bytes(part.SerializeToString())
            assert build_plan(rtx, path, 89, 1)  # several batch sizes are those of the expert above


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALF)
def test_whole_decoder_plan_builds_without_a_gpu(rtx, tmp_path, precision):
    path = tmp_path / "decoder.onnx"
    path.write_bytes(decoder_graph(random_decoder(), TILE // 4, lowering("gpu", precision)).to_bytes())
    assert len(build_plan(rtx, path, 89, 4)) > 100_000


def test_gpu_unknown_to_the_library(rtx, tmp_path):
    path = tmp_path / "expert.onnx"
    path.write_bytes(expert_graph(random_expert(0), TILE // 4, lowering("gpu", "fp16")).to_bytes())
    with pytest.raises(
        EngineError, match=r"builds for compute capability .*8\.9.*, not for 9\.0; use the other"
    ):
        build_plan(rtx, path, 90, 4)


def test_gpu_without_the_precision(rtx, tmp_path):
    path = tmp_path / "expert.onnx"
    path.write_bytes(expert_graph(random_expert(0), TILE // 4, lowering("gpu", "bf16")).to_bytes())
    with pytest.raises(EngineError, match=r"no plan for compute capability 7\.5 .*another precision"):
        build_plan(rtx, path, 75, 4)


def test_file_that_is_not_a_graph(rtx, tmp_path):
    path = tmp_path / "expert.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(EngineError, match=r"expert\.onnx: tensorrt_rtx .* cannot read it \(.+\); export"):
        build_plan(rtx, path, 89, 4)


def test_loading_a_plan_without_a_gpu_gives_the_reason(rtx, tmp_path, cache):
    """On a machine without a GPU the error contains the library's own message."""
    path = tmp_path / "decoder.onnx"
    path.write_bytes(small_graph(16).SerializeToString())
    key = plan_store.key_of(rtx, "cd" * 32, 89, 2)
    try:
        assert open_plan(rtx, path, key, cache)
    except EngineError as error:
        assert "the plan does not load (" in str(error) and "gives no reason" not in str(error)
    assert [record.name for record in plan_store.list_plans(cache / "tensorrt")] == [key.name]


# Plans on disk.


def test_cached_plan_is_found(cache, tmp_path):
    folders = plan_store.plan_folders(tmp_path / "engine", cache)
    assert plan_store.read_plan(KEY, folders) is None
    directory = plan_store.write_plan(folders[1], KEY, "expert_0.onnx", b"plan")
    assert plan_store.read_plan(KEY, folders) == b"plan"
    plan_store.write_plan(folders[0], KEY, "expert_0.onnx", b"the engine's own")
    assert plan_store.read_plan(KEY, folders) == b"the engine's own"
    assert directory.name == "abababababab-tensorrt_rtx-9.9-sm89-b4"
    assert plan_store.write_plan(folders[1], KEY, "expert_0.onnx", b"newer") == directory  # replaced


OTHERS = {
    "version": replace(KEY, version="9.8"),
    "flavour": replace(KEY, flavour="tensorrt"),
    "capability": replace(KEY, capability=86),
    "batch": replace(KEY, max_batch=2),
}


@pytest.mark.parametrize("which", OTHERS)
def test_stale_plan_is_refused_with_the_reason(graph, cache, caplog, monkeypatch, which):
    plan_store.write_plan(cache / "tensorrt", OTHERS[which], "expert_0.onnx", b"plan")
    monkeypatch.setattr(backend, "build_plan", lambda *a, **k: b"new")
    with caplog.at_level(logging.INFO, "moesr"):
        assert open_plan(fake_library({b"new": "engine"}), graph, KEY, cache) == "engine"
    assert f"does not fit: it is for {OTHERS[which]}, but {KEY} is needed" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "record", "no record", "no plan", "another's"])
def test_damaged_plan_is_not_used(cache, caplog, damage):
    directory = plan_store.write_plan(cache, KEY, "expert_0.onnx", b"plan")
    if damage == "cut":
        (directory / "graph.plan").write_bytes(b"pla")
    elif damage == "record":
        (directory / "plan.json").write_text("{")
    elif damage == "another's":
        record = json.loads((directory / "plan.json").read_text()) | {"version": "9.8"}
        (directory / "plan.json").write_text(json.dumps(record))
    else:
        (directory / {"no record": "plan.json", "no plan": "graph.plan"}[damage]).unlink()
    assert plan_store.read_plan(KEY, [cache]) is None
    assert f"{directory}: not used: " in caplog.text


def test_external_weights_are_part_of_the_plan_key(tmp_path):
    """Graphs that differ only in their external weights must not share a plan."""
    import onnx
    from engines import decoder_graph as tiny

    model = tiny(TILE)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(300, np.float32), "beside"))
    path = tmp_path / "decoder.onnx"
    options = {"save_as_external_data": True, "location": "decoder.bin", "size_threshold": 1024}
    onnx.save(model, path, **options)
    first, own = plan_store.identity(path), sha256_of(path)
    assert first != own
    weights = tmp_path / "decoder.bin"
    weights.write_bytes(b"\x01" + weights.read_bytes()[1:])
    assert plan_store.identity(path, own) not in (first, own) and sha256_of(path) == own
    alone = Path(build_engine(tmp_path / "engine")) / "decoder.onnx"
    assert plan_store.identity(alone) == sha256_of(alone)


def test_missing_plan_is_built_once_and_cached(graph, cache, monkeypatch):
    built = []
    monkeypatch.setattr(backend, "build_plan", lambda *a, **k: built.append(k["timing_cache"]) or b"new")
    library = fake_library({b"new": "engine"})
    assert open_plan(library, graph, KEY, cache) == "engine"
    assert open_plan(library, graph, KEY, cache) == "engine"
    assert built == [cache / "tensorrt_rtx-9.9-sm89.timings"]
    assert open_plan(library, graph, KEY, None) == "engine" and built[1:] == [None]  # nothing is cached


def test_plan_that_does_not_load_is_built_again(graph, cache, monkeypatch, caplog):
    plan_store.write_plan(graph.parent / "tensorrt", KEY, graph.name, b"of another driver")
    monkeypatch.setattr(backend, "build_plan", lambda *a, **k: b"new")
    assert open_plan(fake_library({b"new": "engine"}), graph, KEY, cache) == "engine"
    assert "does not load (Serialization assertion failed); building it again" in caplog.text


def test_plan_that_never_loads_is_refused(graph, cache, monkeypatch):
    monkeypatch.setattr(backend, "build_plan", lambda *a, **k: b"new")
    with pytest.raises(
        EngineError, match=r"sm89-b4: the plan does not load \(Serialization.*remove this folder"
    ):
        open_plan(fake_library(), graph, KEY, cache)


def test_cache_that_cannot_be_written_is_bypassed(graph, tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(backend, "build_plan", lambda *a, **k: b"new")
    assert open_plan(fake_library({b"new": "engine"}), graph, KEY, tmp_path / "cache") == "engine"
    assert "it will be built again the next time" in caplog.text


def test_missing_library_names_its_package(monkeypatch):
    def missing() -> None:
        raise ImportError("No module named 'tensorrt'")

    monkeypatch.setattr(library, "_MODULES", {"tensorrt": missing, "tensorrt_rtx": missing})
    library.load.cache_clear()
    with pytest.raises(
        EngineError, match=r"tensorrt does not load .*moesr\[tensorrt\]'; tensorrt_rtx does not"
    ):
        library.load()
    library.load.cache_clear()


# Sessions, on the simulated GPU.


class TensorRTRig(CudaRig):
    """A worker whose TensorRT sessions compute plain Python functions."""

    def __init__(self, manifest: Manifest, tmp_path: Path, max_batch: int, keep_all: bool = True) -> None:
        super().__init__(manifest, tmp_path, max_batch)
        self.engines: dict[str, FakeEngine] = {}

        def open_graph(role: str) -> TensorRTSession:
            graph = manifest.graphs[role]
            self.engines[role] = FakeEngine(self.driver, graph.boundary, FUNCTIONS.get(role, eps_of))
            library = fake_library(flavour="tensorrt_rtx" if keep_all else "tensorrt")
            return TensorRTSession(library, self.engines[role], Path(graph.file), graph.boundary)

        self.residency._open, self.residency._keep_all = open_graph, keep_all


@pytest.mark.parametrize("keep_all", [True, False], ids=["all, RTX", "few, data centre"])
def test_loop_over_plans_equals_the_host(tmp_path, keep_all):
    manifest = read_manifest(build_engine(tmp_path / "engine"))
    host, rig = Rig(manifest, 4), TensorRTRig(manifest, tmp_path, 4, keep_all)
    wants, jobs = alike(host, steps=7), alike(rig, steps=7)
    host.run(*wants)
    rig.run(*jobs)
    for job, want in zip(jobs, wants, strict=True):
        np.testing.assert_allclose(job.image, want.image, rtol=1e-5, atol=1e-6)
    assert rig.driver.log.count("capture") >= 4
    for engine in rig.engines.values():
        batches = [context.shapes[next(iter(context.shapes))][0] for context in engine.contexts]
        assert len(set(batches)) == len(batches)  # one context per batch size
        assert [context.profile for context in engine.contexts] == [int(batch == 1) for batch in batches]
        assert len({context.memory for context in engine.contexts}) == 1  # all over the same working memory
    rig.worker.close()


def test_plan_of_another_graph_is_refused(tmp_path):
    manifest = read_manifest(build_engine(tmp_path / "engine"))
    decoder, expert = manifest.graphs["decoder"], manifest.graphs["expert_0"]
    engine = FakeEngine(None, decoder.boundary, eps_of)
    found = backend.boundary_of(fake_library(), engine)
    with pytest.raises(EngineError, match=r"expert_0\.onnx: is z float32 .*, expected z_t float32"):
        backend.check_boundary(Path(expert.file), found, expert.boundary)


def test_failed_run_is_an_error(tmp_path):
    manifest = read_manifest(build_engine(tmp_path / "engine"))
    rig = TensorRTRig(manifest, tmp_path, 1)
    opened = rig.residency._open

    def failing(role: str) -> SimulatedSession:
        session = opened(role)
        rig.engines[role].create_execution_context = lambda strategy: None
        return session

    rig.residency._open = failing
    with pytest.raises(EngineError, match=r"expert_3\.onnx: its plan cannot be prepared .*see moesr-doctor"):
        rig.run(rig.job(16, 16))


def bound(tmp_path: Path, compiled: Path | None, engine: FakeEngine | None = None) -> TensorRTSession:
    """Return a session of the decoder that is bound to buffers of a simulated GPU."""
    manifest = read_manifest(build_engine(tmp_path / "engine"))
    graph, (device, driver) = manifest.graphs["decoder"], simulated_device(tmp_path / "kernels")
    engine = engine or FakeEngine(driver, graph.boundary, FUNCTIONS["decoder"])
    session = TensorRTSession(fake_library(), engine, Path(graph.file), graph.boundary, compiled)
    specs = (*graph.boundary.inputs, *graph.boundary.outputs)
    session.bind({spec.name: device.buffer(spec, 2) for spec in specs}, 2)
    return session


def test_session_frees_its_memory_and_closes_once(tmp_path):
    graph = read_manifest(build_engine(tmp_path / "engine")).graphs["decoder"]
    device, driver = simulated_device(tmp_path / "kernels")
    session = TensorRTSession(
        fake_library(),
        FakeEngine(driver, graph.boundary, FUNCTIONS["decoder"]),
        Path(graph.file),
        graph.boundary,
    )
    with pytest.raises(EngineError, match="open the engine again"):
        session.enqueue(1)  # it is not bound yet
    buffers = {s.name: device.buffer(s, 1) for s in (*graph.boundary.inputs, *graph.boundary.outputs)}
    driver.synchronize()
    before = set(driver.blocks)
    for _ in range(2):  # binding again replaces the working memory
        session.bind(buffers, 1)
        session.enqueue(1)
        driver.synchronize()
        assert len(set(driver.blocks) - before) == 1
    for _ in range(2):
        session.close()
        driver.synchronize()
        assert set(driver.blocks) == before
    with pytest.raises(EngineError, match="open the engine again"):
        session.enqueue(1)


def test_kernels_compiled_by_the_library_are_cached_between_processes(tmp_path, caplog):
    file = tmp_path / "cache" / "compiled" / "key.bin"
    first = bound(tmp_path, file)
    first.enqueue(1)
    one = file.read_bytes()
    first.enqueue(1)
    assert file.read_bytes() == one
    first.enqueue(2)
    both = file.read_bytes()
    assert both.startswith(b"kernels") and len(both) > len(one)

    second = bound(tmp_path, file)
    second.enqueue(2)
    assert second._runner._engine.caches[0].before == both == file.read_bytes()

    file.write_bytes(b"of another driver")
    with caplog.at_level(logging.INFO, "moesr"):
        bound(tmp_path, file).enqueue(1)
    assert "kernels are compiled again" in caplog.text and file.read_bytes() == one


def test_kernels_that_cannot_be_cached_are_compiled_again(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO, "moesr"):
        bound(tmp_path, tmp_path / "file" / "key.bin").enqueue(1)
    assert "is not cached: " in caplog.text
    bound(tmp_path, None).enqueue(1)


def test_context_without_memory_raises_memory_error(tmp_path):
    session = bound(tmp_path, None)
    library, engine = session._runner._library, session._runner._engine
    engine.create_execution_context = lambda config: library.errors.append("CUDA out of memory")
    with pytest.raises(MemoryLimitError, match=r"decoder\.onnx: no memory for its plan .*max_batch"):
        session.enqueue(1)


def test_out_of_memory_on_opening_builds_no_other_plan(graph, cache, monkeypatch):
    plan_store.write_plan(cache / "tensorrt", KEY, graph.name, b"plan")
    monkeypatch.setattr(backend, "build_plan", None)
    with pytest.raises(MemoryLimitError, match=r"no memory to open its plan \(cudaMalloc failed to alloc"):
        open_plan(fake_library(complaint="cudaMalloc failed to allocate memory"), graph, KEY, cache)


def test_build_reports_progress_and_limits_its_memory(graph, cache, monkeypatch, caplog):
    given = []

    def build(*arguments: object, **options: Any) -> bytes:
        given.append(options["workspace_bytes"])
        for share in (0.1, 0.3, 0.3, 0.8, 1.0):
            options["on_progress"](share)
        return b"new"

    monkeypatch.setattr(backend, "build_plan", build)
    monkeypatch.setattr(backend, "memory_bytes", lambda: (3 << 30, 24 << 30))
    with caplog.at_level(logging.INFO, "moesr"):
        open_plan(fake_library({b"new": "engine"}), graph, KEY, cache)
    assert given == [3 << 29]
    assert [r.message for r in caplog.records if "built" in r.message and "%" in r.message] == [
        f"{graph.name}: {share} % built" for share in (25, 75, 100)
    ]


def test_unsupported_gpu_is_not_offered(monkeypatch):
    """The probe fails for such a GPU, so that `auto` tries the next backend."""
    library = fake_library()
    library.module.ComputeCapability = SimpleNamespace(SM89="SM89")
    monkeypatch.setattr(backend, "load", lambda: library)
    for capability, offered in (((8, 9), True), ((9, 0), False)):
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(backend, "open_device", lambda index, device=device: device)
        if offered:
            assert backend.probe().devices == {"cuda": backend.MAX_BATCH}
        else:
            with pytest.raises(EngineError, match=r"builds for compute capability 8\.9, not for 9\.0"):
                backend.probe()


def test_formats_of_values_follow_their_names(rtx, tmp_path, monkeypatch):
    """Half-precision values whose names end in ".nhwc" are channels last, and the library accepts that."""
    from onnx import TensorProto, helper

    from moesr.runtime.backends.tensorrt import plan_builder

    names = ["x.nhwc", "y.nhwc", "z"]
    x, y, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["B", 8, 4, 4]) for n in names)
    nodes = [helper.make_node("Relu", ["x.nhwc"], ["y.nhwc"]), helper.make_node("Neg", ["x.nhwc"], ["z"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y, z]), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    seen = {}
    set_formats = plan_builder._set_formats

    def spy(trt: Any, network: Any) -> None:
        set_formats(trt, network)
        values = [network.get_input(0), network.get_output(0), network.get_output(1)]
        seen.update({value.name: value.allowed_formats for value in values})

    monkeypatch.setattr(plan_builder, "_set_formats", spy)
    path = tmp_path / "formats.onnx"
    path.write_bytes(model.SerializeToString())
    assert build_plan(rtx, path, 89, 2)
    last, linear = (1 << int(getattr(rtx.module.TensorFormat, name)) for name in ("HWC8", "LINEAR"))
    assert seen == {"x.nhwc": last, "y.nhwc": last, "z": linear}
