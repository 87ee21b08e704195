"""ONNX Runtime on an NVIDIA GPU: all nodes of a graph run there, between device buffers on one stream."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.backends.base import GpuSession, SessionOptions
from moesr.runtime.devices.capture_lock import capture_lock
from moesr.runtime.devices.cuda import Buffer
from moesr.runtime.devices.driver import Driver
from moesr.runtime.engine.graph_spec import Boundary
from moesr.runtime.errors import EngineError, MemoryLimitError
from moesr.runtime.system.memory import ran_out_of_memory

PROVIDER = "CUDAExecutionProvider"
_RECORD = "session.record_ep_graph_assignment_info"

log = logging.getLogger("moesr")


def provider(options: SessionOptions) -> tuple[str, dict[str, str]]:
    """Return the provider with its settings: our stream, NHWC convolutions, CUDA graphs by the library."""
    settings = {
        "device_id": str(options.index),
        "arena_extend_strategy": "kSameAsRequested",
        "prefer_nhwc": "1",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
    }
    if options.stream is not None:
        settings |= {"user_compute_stream": str(options.stream)}
    if options.cuda_graphs:
        settings |= {"enable_cuda_graph": "1"}
    return PROVIDER, settings


def prepare(settings: Any) -> None:
    """Make a session record the provider of each node, for `check_assignment`."""
    settings.add_session_config_entry(_RECORD, "1")


def check_assignment(session: Any, path: Path, provider: str = PROVIDER) -> None:
    """Raise EngineError if a node is on another provider, as all runs would copy its values to the CPU."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        raise EngineError(
            f"{path}: this onnxruntime does not report where it runs a graph's nodes; 1.24 and later do: "
            "pip install --upgrade 'moesr[cuda]'"
        )
    elsewhere = Counter(
        f"{node.op_type} on {part.ep_name.removesuffix('ExecutionProvider')}"
        for part in tell()
        if part.ep_name != provider
        for node in part.get_nodes()
    )
    if elsewhere:
        kinds = ", ".join(f"{count} {what}" for what, count in elsewhere.most_common(5))
        raise partly_elsewhere(path, kinds)


def is_partly_elsewhere(error: Exception) -> bool:
    """Return True if the library refused a graph because CUDA graphs need all of its nodes on the GPU."""
    text = str(error).lower()
    return ("graph capture" in text and "partitioned" in text) or ("cuda graph" in text and "node" in text)


def partly_elsewhere(path: Path, what: str) -> EngineError:
    """Return the error for a graph with nodes that are not on the GPU."""
    return EngineError(
        f"{path}: onnxruntime would run part of it elsewhere ({what}); export the engine with "
        "--target gpu or both, use --backend tensorrt, or choose --device cpu"
    )


def load_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from their Python packages, in which the provider itself does not search.

    If the package of a library is missing, the system must have the library; the provider reports what is
    missing.
    """
    preload = getattr(ort, "preload_dlls", None)
    if preload is None:
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # the function prints the names of libraries that it does not find
        try:
            preload()
        except Exception as error:  # the function defines no errors of its own
            log.info("CUDA's libraries are not loaded beforehand: %s", error)
    for line in said.getvalue().splitlines():
        log.info("onnxruntime: %s", line)


class CudaOnnxSession(GpuSession):
    """A `Session` on a GPU. The library captures CUDA graphs itself, so the device does not."""

    capturable = False

    def __init__(
        self, ort: Any, session: Any, path: Path, boundary: Boundary, device: tuple[str, int]
    ) -> None:
        """Make a session; `device` is the kind and the number of the device, as the library names them."""
        super().__init__(path, boundary)
        self._ort, self._device = ort, device
        self._session: Any = session
        self._runs: list[tuple[Any, Any]] = []  # bindings and run options by number of tiles
        self._captured: set[int] = set()  # numbers of tiles that were run before

    def _bind(self, driver: Driver, buffers: Mapping[str, Buffer], max_batch: int) -> None:
        self._runs, self._captured = [], set()
        for batch in range(1, max_batch + 1):
            binding, options = self._session.io_binding(), self._ort.RunOptions()
            for specs, bind in (
                (self._boundary.inputs, binding.bind_input),
                (self._boundary.outputs, binding.bind_output),
            ):
                for spec in specs:
                    address = buffers[spec.name].address
                    bind(spec.name, *self._device, np.dtype(spec.dtype).type, spec.shape(batch), address)
            options.add_run_config_entry("gpu_graph_id", str(batch))
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._runs.append((binding, options))

    def _enqueue(self, driver: Driver, batch: int) -> None:
        if batch in self._captured:
            self._run(batch)
            return
        with capture_lock:  # the library captures in CUDA's global mode, which other threads could disturb
            self._run(batch)
        self._captured.add(batch)

    def _run(self, batch: int) -> None:
        try:
            self._session.run_with_iobinding(*self._runs[batch - 1])
        except Exception as error:  # the library's errors have no common base class
            text = " ".join(str(error).split())
            if ran_out_of_memory(text):
                raise MemoryLimitError(
                    f"{self._path.name}: out of memory ({text:.200}); close other programs that use the GPU, "
                    "lower max_batch, or use an engine with smaller tiles"
                ) from error
            raise EngineError(
                f"{self._path}: onnxruntime cannot run it ({text:.300}); see moesr-doctor"
            ) from error

    def _release(self) -> None:
        self._runs, self._session = [], None
