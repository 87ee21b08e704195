"""ONNX Runtime: the default backend on CPUs, and on NVIDIA GPUs with the onnxruntime-gpu package."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.backends import graph_cache, ort_cuda
from moesr.runtime.backends.base import Offer, SessionOptions, Traits, check_boundary
from moesr.runtime.backends.ort_cuda import CudaOnnxSession
from moesr.runtime.engine import onnx_float32
from moesr.runtime.engine.graph_spec import Boundary, TensorSpec
from moesr.runtime.engine.onnx_external_data import regular_files
from moesr.runtime.errors import EngineError, MemoryLimitError
from moesr.runtime.system import files, memory

TRAITS = Traits(maps_prepared=True)

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}  # the fastest device first
_MAX_BATCH = {"cuda": 4, "cpu": 1}  # one tile occupies a CPU; more tiles only need more memory
_TYPES = {"tensor(float)": "float32"}
_ARENA = {"arena_extend_strategy": 0, "initial_growth_chunk_size_bytes": 512 << 20}  # 0: each region doubles
_PREPARED = "graph.onnx"  # file name in an entry of the graph cache
_PREPARATION = "all optimisations, prepacked weights, 2"  # part of the cache key
# A graph of one Identity node. The arena that sessions share shrinks at the end of a run that asks for it.
_SMALLEST_MODEL = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01sZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02'
    b"\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)

log = logging.getLogger("moesr")

_arena_lock = threading.Lock()
_arena_made = False


def probe() -> Offer:
    """Return the version and the devices; EngineError if the library is not installed or does not load."""
    ort = _library()
    available = ort.get_available_providers()
    devices = {d: _MAX_BATCH[d] for d, name in _PROVIDERS.items() if name in available}
    return Offer(ort.__version__, devices, traits=TRAITS)


def open_session(path: Path, declared: Boundary, options: SessionOptions) -> OnnxSession | CudaOnnxSession:
    """Open an ONNX file; EngineError if it cannot be loaded or its boundary is not the declared one."""
    ort = _library()
    settings = session_options(options.threads)
    _share_arena(ort, settings)
    provider: Any = _PROVIDERS[options.kind]
    if options.kind == "cuda":
        ort_cuda.load_libraries(ort)
        provider = ort_cuda.provider(options)
        ort_cuda.prepare(settings)
    session = _open_prepared(ort, path, options) if options.kind == "cpu" else None
    try:
        if not session:
            with regular_files(path) as regular:
                source = onnx_float32.derive(path) if options.float32 else str(regular)
                session = _session(ort, source, settings, provider)
    except (EngineError, MemoryLimitError):
        raise
    except Exception as error:  # the library's errors have no common base class
        if options.kind == "cuda" and ort_cuda.is_partly_elsewhere(error):
            raise ort_cuda.partly_elsewhere(path, "the graph cannot be captured as a CUDA graph") from error
        raise _explain(path, error) from error
    if session.get_providers()[0] != _PROVIDERS[options.kind]:  # the library only warns
        raise EngineError(
            f"onnxruntime offers {options.kind} but cannot use it (driver, CUDA or cuDNN missing or of "
            "another version); install all with: pip install 'moesr[cuda]', or choose --device cpu"
        )
    found = Boundary(_specs(session.get_inputs()), _specs(session.get_outputs()))
    check_boundary(path, found, declared)
    memory.return_freed()
    boundary = declared.only({spec.name for spec in found.inputs})
    if options.kind == "cuda":
        ort_cuda.check_assignment(session, path)
        return ort_cuda.CudaOnnxSession(ort, session, path, boundary, ("cuda", options.index))
    return OnnxSession(ort, session, path, boundary)


def _session(ort: Any, source: str | bytes, settings: Any, provider: Any) -> Any:
    """Open a file or a model on one provider; an error is raised at once, without the library's own retry."""
    return ort.InferenceSession(source, settings, providers=[provider], enable_fallback=0)


def _open_prepared(ort: Any, path: Path, options: SessionOptions) -> Any:
    """Return a session of the prepared graph from the cache, or None if there is no cache.

    The graph is prepared now if the cache lacks it. A prepared graph opens at once: its constants are folded,
    laid out and mapped from a file.
    """
    if not (options.cache and options.files):
        return None
    settings = session_options(options.threads)
    _share_arena(ort, settings)
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    kept = None
    try:
        made_of = graph_cache.origin(path.parent, options.files, "onnxruntime", ort.__version__, _PREPARATION)
        kept = graph_cache.find(options.cache, made_of, verify=options.verify)
        kept = kept or graph_cache.write(options.cache, made_of, partial(_prepare, ort, path))
        return kept and _session(ort, str(kept / _PREPARED), settings, _PROVIDERS["cpu"])
    except Exception as error:  # an error in the graph itself is reported when it is opened without the cache
        log.info("%s: not opened as prepared: %s", path, files.reason(error))
    if kept:
        graph_cache.remove(kept)
    return None


def _prepare(ort: Any, path: Path, directory: Path) -> None:
    """Write a graph after all the optimizations that a session applies when it opens the graph."""
    settings = session_options(1)
    _share_arena(ort, settings)
    settings.optimized_model_filepath = str(directory / _PREPARED)
    for name, value in (
        ("optimized_model_external_initializers_file_name", "weights.bin"),
        ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        settings.add_session_config_entry(f"session.{name}", value)
    with regular_files(path) as regular:
        _session(ort, str(regular), settings, _PROVIDERS["cpu"])
    memory.return_freed()


def session_options(threads: int | None = None) -> Any:
    """Return the options of all sessions; with `threads` None the library chooses the number of threads."""
    options = _library().SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # only fatal messages; errors are raised as exceptions
    # Planning the reuse of buffers takes a time quadratic in the number of nodes (100 s for the full-width
    # decoder at 512 px), and the arena reuses buffers without a plan. The memory pattern of a first run is
    # off, too: with it, later runs allocate a second block of the same size, in which each tensor has its own
    # place instead of memory that is still in the CPU's caches. A full-width step took 9 % longer with it,
    # and the decoder needed twice the memory.
    options.enable_mem_reuse = False
    options.enable_mem_pattern = False
    # A Split node in place of a tensor's slices would copy the whole tensor before its strips are read.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "GatherSliceToSplitFusion")
    return options


def release() -> None:
    """Return working memory that no open session needs to the system."""
    if not _arena_made:
        return
    with contextlib.suppress(Exception):  # no result depends on it
        _shrink_arena(_library())
    memory.return_freed()


class OnnxSession:
    """A loaded graph with one binding per batch size; all bindings use the same buffers."""

    capturable = False

    def __init__(self, ort: Any, session: Any, path: Path, boundary: Boundary) -> None:
        self._ort, self._session, self._path, self._boundary = ort, session, path, boundary
        self._run = ort.RunOptions()
        self._bindings: list[Any] = []

    @property
    def boundary(self) -> Boundary:
        """See `Session.boundary`."""
        return self._boundary

    def bind(self, buffers: Mapping[str, np.ndarray], max_batch: int) -> None:
        """See `Session.bind`; the buffers are host arrays, which a run reads and writes in place."""
        value_of = self._ort.OrtValue.ortvalue_from_numpy
        self._bindings = []
        for batch in range(1, max_batch + 1):
            binding = self._session.io_binding()
            for spec in self._boundary.inputs:
                part = buffers[spec.name][:batch] if spec.per_tile else buffers[spec.name]
                binding.bind_ortvalue_input(spec.name, value_of(part))
            for spec in self._boundary.outputs:
                binding.bind_ortvalue_output(spec.name, value_of(buffers[spec.name][:batch]))
            self._bindings.append(binding)

    def enqueue(self, batch: int) -> None:
        """See `Session.enqueue`."""
        try:
            self._session.run_with_iobinding(self._bindings[batch - 1], self._run)
        except Exception as error:  # the library's errors have no common base class
            raise _explain(self._path, error) from error

    def abort(self) -> None:
        """See `Session.abort`."""
        self._run.terminate = True

    def close(self) -> None:
        """See `Session.close`."""
        self._bindings = []
        del self._session


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        if memory.ran_out_of_memory(error):
            raise MemoryLimitError(
                f"no memory to load onnxruntime ({error}); close other programs"
            ) from error
        raise EngineError(
            f"onnxruntime does not load ({error}); install it with: pip install 'moesr[cpu]' "
            "(or 'moesr[cuda]' for an NVIDIA GPU)"
        ) from error
    return onnxruntime


def _share_arena(ort: Any, options: Any) -> None:
    """Let all sessions use one CPU arena; graphs run in turn, so their peaks need not add up.

    The arena grows by large regions, each twice as large as the one before. Memory that is not touched costs
    nothing, and a few large regions can hold tensors of different sizes in turn; with one region per request
    they could not. The configured size of the first region applies only after the arena has shrunk, and
    memory that the arena held before is never returned, so the smallest graph runs first.
    """
    global _arena_made
    options.add_session_config_entry("session.use_env_allocators", "1")
    with _arena_lock:
        if not _arena_made:
            info = ort.OrtMemoryInfo(
                "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
            )
            ort.create_and_register_allocator(info, ort.OrtArenaCfg(_ARENA))
            _arena_made = True
            _shrink_arena(ort)


def _shrink_arena(ort: Any) -> None:
    """Run the smallest graph; at the end of this run the arena returns unused memory."""
    run = ort.RunOptions()
    run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    settings = session_options(1)
    settings.add_session_config_entry("session.use_env_allocators", "1")
    session = ort.InferenceSession(_SMALLEST_MODEL, settings, providers=[_PROVIDERS["cpu"]])
    session.run(None, {"x": np.zeros(1, np.float32)}, run)


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    """Convert the library's inputs or outputs; an open dimension is a name, or "?"."""
    return tuple(
        TensorSpec(v.name, _TYPES.get(v.type) or str(v.type), tuple("?" if d is None else d for d in v.shape))
        for v in values
    )


def _explain(path: Path, error: Exception) -> EngineError | MemoryLimitError:
    text = " ".join(str(error).split())
    if memory.ran_out_of_memory(error, path):
        return MemoryLimitError(
            f"{path.name}: out of memory ({text:.200}); close other programs, "
            "or use an engine with smaller tiles"
        )
    cure = "export the engine again with moesr-export"
    if "NOT_IMPLEMENTED" in text:
        cure = (
            "it lacks a data type of this graph, such as bfloat16: use another --backend, or export as --fp16"
        )
    return EngineError(f"{path}: onnxruntime cannot run it ({text:.300}); {cure}")
