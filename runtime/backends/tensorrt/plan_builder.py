"""Building TensorRT plans from ONNX files.

Plans are strongly typed: the types in the file determine every precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesr.runtime.backends.tensorrt.library import Library
from moesr.runtime.engine.onnx_external_data import regular_files
from moesr.runtime.engine.partitioned_graph import NHWC
from moesr.runtime.errors import EngineError, MemoryLimitError
from moesr.runtime.system.files import reason, write_atomically
from moesr.runtime.system.memory import ran_out_of_memory

DEFAULT_WORKSPACE_BYTES = 8 << 30
"""The limit of a plan's working memory; the builder decides how much of it a plan needs."""

OnProgress = Callable[[float], None]
"""A function that is called with the finished share of the build, 0 to 1."""


def build_plan(
    library: Library,
    path: Path,
    capability: int,
    max_batch: int,
    *,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    timing_cache: Path | None = None,
    on_progress: OnProgress = lambda share: None,
) -> bytes:
    """Build the plan of an ONNX file for 1 to `max_batch` tiles on a GPU of `capability` (89 for 8.9).

    `timing_cache` is a file with the measurements of earlier builds, which is read and written. Raises
    EngineError if the library does not support the file or the capability, and MemoryLimitError if memory ran
    out.
    """
    trt = library.module
    library.errors.clear()
    builder = trt.Builder(library.logger)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, library.logger)
    with regular_files(path) as regular:
        understood = parser.parse_from_file(str(regular))
    if not understood:
        complaint = library.complaint()
        raise EngineError(f"{path}: {library} cannot read it ({complaint}); export the engine again")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.progress_monitor = _monitor(trt, on_progress)
    config.add_optimization_profile(_profile(builder, network, 1, max_batch))
    if max_batch > 1:  # a second profile, so that the kernels for a single tile are tuned for it
        config.add_optimization_profile(_profile(builder, network, 1, 1))
    _set_formats(trt, network)
    if library.ahead_of_time:
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability_of(library, capability), 0)
    else:
        _read_timings(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failure(library, path, capability)
    if not library.ahead_of_time:
        _write_timings(config, timing_cache)
    on_progress(1.0)
    return bytes(plan)


def capability_of(library: Library, capability: int) -> Any:
    """Return the library's constant for a compute capability; EngineError if it builds no plans for it."""
    offered = library.module.ComputeCapability
    found = getattr(offered, f"SM{capability}", None)
    if found is None:
        numbers = sorted(int(name[2:]) for name in dir(offered) if name.startswith("SM"))
        raise EngineError(
            f"{library} builds for compute capability {', '.join(map(as_text, numbers))}, not for "
            f"{as_text(capability)}; use the other flavor of TensorRT on that GPU, or --backend onnxruntime"
        )
    return found


def as_text(capability: int) -> str:
    """Return a compute capability in its usual spelling, "8.9" for 89."""
    return f"{capability // 10}.{capability % 10}"


def _strongly_typed(trt: Any) -> int:
    """Return the flag for strongly typed networks; 0 if the library has no other kind."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _profile(builder: Any, network: Any, least: int, most: int) -> Any:
    """Return a profile for batch sizes from `least` to `most`, tuned for `most`."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        shape = tuple(value.shape)
        sizes = [tuple(batch if size < 0 else size for size in shape) for batch in (least, most, most)]
        profile.set_shape(value.name, *sizes)
    return profile


def _set_formats(trt: Any, network: Any) -> None:
    """Set inputs and outputs whose names end in `NHWC` to channels last, and all others to NCHW."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for value in (*inputs, *(network.get_output(index) for index in range(network.num_outputs))):
        layout = trt.TensorFormat.HWC8 if value.name.endswith(NHWC) else trt.TensorFormat.LINEAR
        value.allowed_formats = 1 << int(layout)


def _monitor(trt: Any, on_progress: OnProgress) -> Any:
    """Return a monitor that turns the library's nested phases into one share of the whole build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.ranges: dict[str, tuple[float, float, int]] = {}  # (from, width, steps)
            self.at: dict[str, int] = {}
            self.share = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            start, width, count = self.ranges.get(parent or "", (0.0, 1.0, 1))
            done = min(self.at.get(parent or "", 0), count - 1) if count else 0
            self.ranges[name] = start + width * done / max(count, 1), width / max(count, 1), steps
            self.at[name] = 0

        def step_complete(self, name: str, step: int) -> bool:
            self.at[name] = step + 1
            start, width, count = self.ranges[name]
            self.share = min(max(self.share, start + width * (step + 1) / max(count, 1)), 1.0)
            on_progress(self.share)
            return True

        def phase_finish(self, name: str) -> None:
            self.at.pop(name, None)

    return Monitor()


def _failure(library: Library, path: Path, capability: int) -> EngineError | MemoryLimitError:
    text = library.complaint()
    if ran_out_of_memory(text):
        return MemoryLimitError(f"{path.name}: no memory to build a plan ({text}); close other programs")
    return EngineError(
        f"{path}: {library} builds no plan for compute capability {as_text(capability)} ({text}); "
        "export the engine in another precision, or use --backend onnxruntime"
    )


def _read_timings(config: Any, path: Path | None) -> None:
    """Give the library the timings of earlier builds; it ignores those of another version."""
    known = b""
    if path:
        with contextlib.suppress(OSError):
            known = path.read_bytes()
    config.set_timing_cache(config.create_timing_cache(known), False)


def _write_timings(config: Any, path: Path | None) -> None:
    if path is None:
        return
    try:
        with write_atomically(path) as stream:
            stream.write(bytes(config.get_timing_cache().serialize()))
    except OSError as error:
        raise EngineError(f"{path}: timings cannot be cached: {reason(error)}") from error
