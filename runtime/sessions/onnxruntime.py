"""ONNX Runtime: the default backend on CPUs, and on NVIDIA GPUs with the onnxruntime-gpu package."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime import memory
from moesr.runtime.errors import EngineError, MemoryLimitError
from moesr.runtime.sessions import Offer, Shapes

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}  # the fastest first
_MAX_BATCH = {"cuda": 4, "cpu": 1}  # a CPU is busy with one tile: more would only need more memory
_SAME_AS_REQUESTED = 1  # arena growth; the default doubles it, which wastes up to half of the peak

_arena_lock = threading.Lock()
_arena_made = False


def probe() -> Offer:
    """Version and devices; EngineError where the library is not installed or does not load."""
    ort = _library()
    available = ort.get_available_providers()
    return Offer(ort.__version__, {d: _MAX_BATCH[d] for d, name in _PROVIDERS.items() if name in available})


def open_session(path: Path, shapes: Shapes, device: str, threads: int | None, max_batch: int) -> OnnxSession:
    """Open an ONNX file; EngineError where it cannot be loaded or is not what `shapes` describes."""
    ort = _library()
    kind, _, number = device.partition(":")
    options = session_options(threads)
    _share_arena(ort, options)
    provider: Any = _PROVIDERS[kind]
    if kind == "cuda":
        provider = (provider, {"device_id": number or "0", "arena_extend_strategy": "kSameAsRequested"})
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # the library has no common base for its errors
        raise _explain(path, error) from error
    if session.get_providers()[0] != _PROVIDERS[kind]:  # the library falls back with a warning only
        raise EngineError(
            f"onnxruntime offers {kind} but cannot use it (driver, CUDA or cuDNN missing or "
            "of another version); repair these, or choose --device cpu"
        )
    _check_boundary(path, session, shapes)
    memory.return_freed()
    return OnnxSession(ort, session, path, shapes, kind, int(number or 0), max_batch)


def session_options(threads: int | None = None) -> Any:
    """Options under which graphs are run; `threads` None leaves their number to the library."""
    options = _library().SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors; they come as exceptions too
    # Planning which buffers to use again takes a time that grows with the square of the nodes (100 s for the
    # full-width decoder at 512 px); the arena uses them again without a plan.
    options.enable_mem_reuse = False
    return options


class OnnxSession:
    """A loaded graph with one binding a batch size, all over the same buffers."""

    def __init__(
        self, ort: Any, session: Any, path: Path, shapes: Shapes, kind: str, index: int, max_batch: int
    ) -> None:
        self._session, self._path, self._max_batch = session, path, max_batch
        names = [i.name for i in session.get_inputs()]
        self._inputs = {name: _buffer(shapes.inputs[name], max_batch) for name in names}
        self._output = _buffer(shapes.output, max_batch)
        self._bindings, self._copies = [], []
        output_name = session.get_outputs()[0].name
        for batch in range(1, max_batch + 1):
            binding, copies = session.io_binding(), []
            for name, array in self._inputs.items():
                part = array if shapes.inputs[name][0] is not None else array[:batch]
                value = ort.OrtValue.ortvalue_from_numpy(part, kind, index)  # on the CPU: the same memory
                binding.bind_ortvalue_input(name, value)
                copies.append((value, part))
            binding.bind_ortvalue_output(output_name, ort.OrtValue.ortvalue_from_numpy(self._output[:batch]))
            self._bindings.append(binding)
            self._copies.append([] if kind == "cpu" else copies)

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """See `Session.inputs`."""
        return self._inputs

    @property
    def max_batch(self) -> int:
        """See `Session.max_batch`."""
        return self._max_batch

    def run(self, batch: int) -> np.ndarray:
        """See `Session.run`. MemoryLimitError where the memory ran out, EngineError for any other failure."""
        try:
            for value, array in self._copies[batch - 1]:
                value.update_inplace(array)
            self._session.run_with_iobinding(self._bindings[batch - 1])
        except Exception as error:  # the library has no common base for its errors
            raise _explain(self._path, error) from error
        return self._output[:batch]


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"onnxruntime does not load ({error}); install it with: pip install 'moesr[cpu]' "
            "(or 'moesr[cuda]' for an NVIDIA GPU)"
        ) from error
    return onnxruntime


def _share_arena(ort: Any, options: Any) -> None:
    """Let all sessions draw on one CPU arena: graphs run in turn, so their peaks need not add up."""
    global _arena_made
    with _arena_lock:
        if not _arena_made:
            info = ort.OrtMemoryInfo(
                "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
            )
            ort.create_and_register_allocator(
                info, ort.OrtArenaCfg({"arena_extend_strategy": _SAME_AS_REQUESTED})
            )
            _arena_made = True
    options.add_session_config_entry("session.use_env_allocators", "1")


def _check_boundary(path: Path, session: Any, shapes: Shapes) -> None:
    """Refuse a graph whose inputs or output are not those that the runtime will bind."""
    found = {i.name: (i.type, i.shape) for i in session.get_inputs()}
    wanted = shapes.inputs.keys()
    if found.keys() - wanted or wanted - found.keys() - shapes.optional or len(session.get_outputs()) != 1:
        raise EngineError(
            f"{path}: has inputs {', '.join(found)} and {len(session.get_outputs())} outputs, "
            f"expected {', '.join(wanted)} and one output; export the engine again"
        )
    output = session.get_outputs()[0]
    boundary = [(n, *found[n], shapes.inputs[n]) for n in found]
    for name, kind, shape, want in [*boundary, (output.name, output.type, output.shape, shapes.output)]:
        fixed = all(w is None or not isinstance(s, int) or s == w for s, w in zip(shape, want, strict=False))
        if kind != "tensor(float)" or len(shape) != len(want) or not fixed:
            raise EngineError(
                f"{path}: {name} is {kind} {shape}, expected tensor(float) "
                f"{['B' if size is None else size for size in want]}; export the engine again"
            )


def _buffer(shape: tuple[int | None, ...], max_batch: int) -> np.ndarray:
    return np.zeros([max_batch if size is None else size for size in shape], np.float32)


def _explain(path: Path, error: Exception) -> EngineError | MemoryLimitError:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "alloc" in text.lower():
        return MemoryLimitError(
            f"{path.name}: out of memory ({text:.200}); close other programs, "
            "or use an engine with smaller tiles"
        )
    return EngineError(
        f"{path}: onnxruntime cannot run it ({text:.300}); export the engine again with moesr-export"
    )
