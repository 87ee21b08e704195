"""OpenVINO: a backend for CPUs with convolutions of its own, and with bfloat16 if the CPU has it.

A graph is compiled for one tile, and a run goes from tile to tile, so that a result does not depend on the
batch. A graph compiled for any batch size takes up to twice as long; compiled for four tiles it is 10 to 20 %
faster and needs four times the working memory.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.backends import graph_cache
from moesr.runtime.backends.base import Offer, SessionOptions, Traits, check_boundary
from moesr.runtime.engine import onnx_external_data, onnx_float32
from moesr.runtime.engine.graph_spec import Boundary, TensorSpec
from moesr.runtime.errors import EngineError, MemoryLimitError
from moesr.runtime.system import memory

TRAITS = Traits(plain_graphs=True, memory_per_session=True)

_TYPES = {"f32": "float32"}
_HINTS = {
    None: "f32",
    "bf16": "bf16",
}  # by precision; by itself the library would choose bf16 if the CPU has it
_COMPILED = "graph.blob"  # file name in an entry of the graph cache

log = logging.getLogger("moesr")

_process: int | None = None  # the process that opened the first graph, which its forks inherit


def probe() -> Offer:
    """Return the version and the devices; EngineError if the library is not installed or does not load."""
    ov = _library()
    try:
        core = _core()
        found = {"cpu": 1} if "CPU" in core.available_devices else {}
        half = bool(found) and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except Exception as error:  # the library's errors have no common base class
        if memory.ran_out_of_memory(error):
            raise _no_memory("openvino", error) from error
        raise EngineError(
            f"openvino cannot use this machine ({_one_line(error)}); choose --backend onnxruntime"
        ) from error
    if not found:
        raise EngineError("openvino has no CPU device here; install it again with: pip install openvino")
    return Offer(ov.__version__.partition("-")[0], found, ("bf16",) if half else (), TRAITS)


def open_session(path: Path, declared: Boundary, options: SessionOptions) -> OpenVinoSession:
    """Compile an ONNX file; EngineError if it cannot be compiled or its boundary is not the declared one."""
    _refuse_forked()
    try:
        compiled = _open_prepared(path, declared, options) or _compile(path, declared, options)
        found = Boundary(_specs(compiled.inputs, declared), _specs(compiled.outputs, declared))
    except (EngineError, MemoryLimitError):
        raise
    except Exception as error:  # the library's errors have no common base class
        raise _explain(path, error) from error
    check_boundary(path, found, _one_tile(declared))
    memory.return_freed()
    return OpenVinoSession(compiled, path, declared.only({spec.name for spec in found.inputs}))


def _refuse_forked() -> None:
    """Raise EngineError in a fork of a process that opened graphs: the library would wait for ever."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise EngineError(
            "openvino was used before this process was forked, and its threads do not exist here; start "
            "processes by the method 'spawn', or choose --backend onnxruntime"
        )


def _compile(path: Path, declared: Boundary, options: SessionOptions) -> Any:
    """Compile an ONNX file for one tile."""
    onnx_external_data.external_files(path)  # the library would accept a file of any format that it knows
    with onnx_external_data.regular_files(path) as regular:
        return _compile_regular(path, regular, declared, options)


def _compile_regular(path: Path, regular: Path, declared: Boundary, options: SessionOptions) -> Any:
    """Compile the file `regular`, which messages call `path`."""
    model = _core().read_model(onnx_float32.derive(path) if options.float32 else regular)
    check_boundary(path, Boundary(_specs(model.inputs, declared), _specs(model.outputs, declared)), declared)
    shapes = {spec.name: list(spec.shape(1)) for spec in declared.inputs}
    known = [next(name for name in port.names if name in shapes) for port in model.inputs]
    model.reshape({name: shapes[name] for name in known})
    return _core().compile_model(model, "CPU", properties(options))


def _open_prepared(path: Path, declared: Boundary, options: SessionOptions) -> Any:
    """Return the compiled graph from the cache, which is filled now if need be, or None without a cache."""
    if not (options.cache and options.files):
        return None
    told, version = properties(options), _library().__version__
    try:
        made_of = graph_cache.origin(path.parent, options.files, "openvino", version, repr(told))
    except OSError:  # the reason is reported when the graph is compiled
        return None
    if kept := graph_cache.find(options.cache, made_of, verify=options.verify):
        try:
            blob = np.memmap(kept / _COMPILED, np.uint8, "r")
            return _core().import_model(_library().Tensor(blob), "CPU", told)
        except Exception as error:  # the library's errors have no common base class
            log.info("%s: compiled again: %s", path, _one_line(error))
            graph_cache.remove(kept)
    made: list[Any] = []

    def write(directory: Path) -> None:
        made.append(_compile(path, declared, options))
        (directory / _COMPILED).write_bytes(made[0].export_model().getbuffer())

    graph_cache.write(options.cache, made_of, write)
    return made[0] if made else None


def _one_tile(declared: Boundary) -> Boundary:
    """Return the boundary of the compiled graph."""
    inputs, outputs = (
        tuple(replace(spec, dims=spec.shape(1)) for spec in specs)
        for specs in (declared.inputs, declared.outputs)
    )
    return Boundary(inputs, outputs)


def release() -> None:
    """Return memory that no open session needs to the system."""
    memory.return_freed()


class OpenVinoSession:
    """A compiled graph and its one request, which runs the tiles in turn in the memory of the buffers."""

    capturable = False

    def __init__(self, compiled: Any, path: Path, boundary: Boundary) -> None:
        self._boundary, self._path = boundary, path
        self._compiled: Any = compiled
        self._request: Any = compiled.create_infer_request()
        self._tiles: list[list[tuple[str, Any]]] = []  # for each tile, its tensors by name
        self._set: int | None = None  # the tile whose tensors are set in the request
        self._aborted = False

    @property
    def boundary(self) -> Boundary:
        """See `Session.boundary`."""
        return self._boundary

    def bind(self, buffers: Mapping[str, np.ndarray], max_batch: int) -> None:
        """See `Session.bind`; the buffers are host arrays."""
        tensor = _library().Tensor
        specs = (*self._boundary.inputs, *self._boundary.outputs)
        self._tiles, self._set = [], None
        for tile in range(max_batch):
            parts = [
                (s.name, buffers[s.name][tile : tile + 1] if s.per_tile else buffers[s.name]) for s in specs
            ]
            self._tiles.append([(name, tensor(part, shared_memory=True)) for name, part in parts])

    def enqueue(self, batch: int) -> None:
        """See `Session.enqueue`."""
        for tile in range(batch):
            try:
                self._run(tile)
            except Exception as error:  # the library's errors have no common base class
                if not self._aborted:
                    raise _explain(self._path, error) from error
            if self._aborted:
                raise EngineError(f"{self._path}: the run was aborted; open the engine again")

    def _run(self, tile: int) -> None:
        if self._set != tile:
            for name, tensor in self._tiles[tile]:
                self._request.set_tensor(name, tensor)
            self._set = tile
        self._request.start_async()
        if self._aborted:  # checked when the run can be canceled, so that no abort is lost
            self._request.cancel()
        self._request.wait()

    def abort(self) -> None:
        """See `Session.abort`."""
        self._aborted = True
        request = self._request
        if request:
            request.cancel()

    def close(self) -> None:
        """See `Session.close`."""
        self._tiles.clear()
        self._request = self._compiled = None


def _library() -> Any:
    try:
        import openvino
    except Exception as error:  # a library that was built for another machine may fail in any way
        if memory.ran_out_of_memory(error):
            text = _one_line(error)
            raise MemoryLimitError(f"no memory to load openvino ({text}); close other programs") from error
        raise EngineError(
            f"openvino does not load ({_one_line(error)}); install it with: pip install 'moesr[openvino]'"
        ) from error
    return openvino


@functools.cache
def _core() -> Any:
    """Return the library's core object; there is one per process."""
    return _library().Core()


def properties(options: SessionOptions) -> dict[str, Any]:
    """Return the options of a compilation.

    Threads are not pinned, since two processes would pin the same cores.
    """
    values: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[options.precision],
        "ENABLE_CPU_PINNING": False,
    }
    if options.threads:
        values["INFERENCE_NUM_THREADS"] = options.threads
    return values


def _specs(ports: Any, declared: Boundary) -> tuple[TensorSpec, ...]:
    """Convert the library's inputs or outputs; one that has several names gets its declared name."""
    known = {spec.name for spec in (*declared.inputs, *declared.outputs)}
    specs = []
    for port in ports:
        names, shape, kind = sorted(port.names), port.partial_shape, port.element_type.get_type_name()
        name = next((n for n in names if n in known), next(iter(names), "?"))
        dims = (
            ("?",)
            if shape.rank.is_dynamic
            else tuple(size.get_length() if size.is_static else "?" for size in shape)
        )
        specs.append(TensorSpec(name, _TYPES.get(kind) or str(kind), dims))
    return tuple(specs)


def _explain(path: Path, error: Exception) -> EngineError | MemoryLimitError:
    text = _one_line(error)
    if memory.ran_out_of_memory(error, path):
        return _no_memory(path.name, error)
    return EngineError(
        f"{path}: openvino cannot run it ({text:.300}); choose --backend onnxruntime, "
        "or export the engine again with moesr-export"
    )


def _no_memory(what: str, error: Exception) -> MemoryLimitError:
    return MemoryLimitError(
        f"{what}: out of memory ({_one_line(error):.200}); close other programs, or use an engine with "
        "smaller tiles"
    )


def _one_line(error: Exception) -> str:
    """Return the library's message without the source locations at its beginning."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(told or lines) or type(error).__name__
