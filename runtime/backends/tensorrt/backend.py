"""Opening graphs with either flavor of TensorRT.

Plans are read from the engine directory or the user's cache; a missing plan is built and cached.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesr.runtime.backends.base import GpuSession, Offer, SessionOptions, Traits, check_boundary
from moesr.runtime.backends.tensorrt import plan_store
from moesr.runtime.backends.tensorrt.library import Library, load
from moesr.runtime.backends.tensorrt.parts_session import PartsSession
from moesr.runtime.backends.tensorrt.plan_builder import (
    DEFAULT_WORKSPACE_BYTES,
    OnProgress,
    build_plan,
    capability_of,
)
from moesr.runtime.backends.tensorrt.plan_runner import PlanRunner, boundary_of
from moesr.runtime.devices.cuda import Buffer
from moesr.runtime.devices.cuda_driver import device_capability, memory_bytes, open_device
from moesr.runtime.devices.driver import Driver
from moesr.runtime.engine.graph_spec import Boundary
from moesr.runtime.engine.partitioned_graph import SUFFIX, read_parts
from moesr.runtime.errors import EngineError, MemoryLimitError, OutputError
from moesr.runtime.system import user_cache
from moesr.runtime.system.memory import ran_out_of_memory

MAX_BATCH = 4
"""The best number of tiles per run on a GPU."""

TRAITS = Traits(runs_parts=True)

log = logging.getLogger("moesr")


def probe() -> Offer:
    """Return the version and the devices; EngineError if the library, the driver or a GPU is missing."""
    library, device = load(), open_device(0)
    if library.ahead_of_time:
        capability_of(library, device_capability(device))
    return Offer(str(library), {"cuda": MAX_BATCH}, traits=TRAITS)


def open_session(path: Path, declared: Boundary, options: SessionOptions) -> TensorRTSession | PartsSession:
    """Open an ONNX file or a graph in parts; EngineError if a plan is missing and cannot be built."""
    library, options = load(), replace(options, cache=options.cache or user_cache.directory())
    device = open_device(options.index)
    capability = device_capability(device)
    if path.name.endswith(SUFFIX):
        return open_parts(library, path, declared, capability, options)
    key = plan_store.key_of(library, plan_store.identity(path), capability, options.max_batch)
    engine = open_plan(library, path, key, options.cache)
    check_boundary(path, boundary_of(library, engine), declared)
    return TensorRTSession(library, engine, path, declared, plan_store.compiled(options.cache, key))


def open_parts(
    library: Library, path: Path, declared: Boundary, capability: int, options: SessionOptions
) -> PartsSession:
    """Open a graph in parts with all its plans; EngineError if it does not have the declared boundary."""
    parts, runners = read_parts(path), {}
    check_boundary(path, parts.boundary, declared)
    for step in parts.steps:
        if step.plan:
            file = path.parent / step.plan.file
            key = plan_store.key_of(library, step.plan.sha256, capability, options.max_batch)
            engine = open_plan(library, file, key, options.cache)
            runners[file.name] = PlanRunner(library, engine, file, plan_store.compiled(options.cache, key))
    return PartsSession(path, declared, parts, runners)


def release() -> None:
    """Do nothing, as nothing is kept between sessions."""


def open_plan(library: Library, path: Path, key: plan_store.PlanKey, cache: Path | None) -> Any:
    """Deserialize the plan of a graph; if none fits, build one and write it to `cache`."""
    folders = plan_store.plan_folders(path.parent, cache)
    data = plan_store.read_plan(key, folders)
    if data is not None:
        engine = _deserialize(library, data)
        if engine is not None:
            return engine
        log.warning(
            "%s: its plan does not load (%s); building it again", path.name, _complaint(library, path)
        )
    for reason in plan_store.misfits(key, folders):
        log.info("%s", reason)
    data = _build(library, path, key, cache)
    engine = _deserialize(library, data)
    if engine is None:
        raise plan_store.unusable(folders[-1] / key.name, _complaint(library, path))
    return engine


def _build(library: Library, path: Path, key: plan_store.PlanKey, cache: Path | None) -> bytes:
    log.info("building a TensorRT plan of %s for this GPU; it takes a minute or more, once", path.name)
    start = time.perf_counter()
    data = build_plan(
        library,
        path,
        key.capability,
        key.max_batch,
        workspace_bytes=_workspace_bytes(),
        timing_cache=plan_store.timings(cache, key),
        on_progress=_logged(path.name),
    )
    log.info("built in %.0f s", time.perf_counter() - start)
    if cache:
        try:
            plan_store.write_plan(cache / plan_store.PLANS_FOLDER, key, path.name, data)
        except OutputError as error:
            log.warning("%s; it will be built again the next time", error)
    return data


def _workspace_bytes() -> int:
    """Return half of the memory that is free on the GPU, at most the builder's default."""
    try:
        return min(DEFAULT_WORKSPACE_BYTES, memory_bytes()[0] // 2)
    except EngineError:
        return DEFAULT_WORKSPACE_BYTES


def _logged(name: str) -> OnProgress:
    """Return a function that logs the progress of a build at every quarter."""
    seen = 0

    def report(share: float) -> None:
        nonlocal seen
        if int(4 * share) > seen:
            seen = int(4 * share)
            log.info("%s: %d %% built", name, 25 * seen)

    return report


def _complaint(library: Library, path: Path) -> str:
    """Return the library's reason why a plan did not load; MemoryLimitError if memory ran out."""
    text = library.complaint()
    if ran_out_of_memory(text):
        raise MemoryLimitError(
            f"{path.name}: no memory to open its plan ({text}); close other programs that use the GPU"
        )
    return text


def _deserialize(library: Library, data: bytes) -> Any:
    library.errors.clear()
    return library.module.Runtime(library.logger).deserialize_cuda_engine(data)


class TensorRTSession(GpuSession):
    """A `Session` that runs a plan with its working memory."""

    def __init__(
        self,
        library: Library,
        engine: Any,
        path: Path,
        declared: Boundary,
        compiled: Path | None = None,
    ) -> None:
        """Make a session.

        `declared` may have more inputs than the engine, and `compiled` is for `PlanRunner`.
        """
        super().__init__(path, declared.only({spec.name for spec in boundary_of(library, engine).inputs}))
        self._runner = PlanRunner(library, engine, path, compiled)

    def _bind(self, driver: Driver, buffers: Mapping[str, Buffer], max_batch: int) -> None:
        nbytes = self._runner.work_bytes
        work = self._take(driver, nbytes).address if nbytes else 0
        addresses = {name: buffer.address for name, buffer in buffers.items()}
        self._runner.bind(driver, addresses, work)

    def _enqueue(self, driver: Driver, batch: int) -> None:
        self._runner.enqueue(batch)

    def _release(self) -> None:
        self._runner.close()
