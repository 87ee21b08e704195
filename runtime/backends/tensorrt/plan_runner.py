"""Running a TensorRT plan between fixed addresses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesr.runtime.backends.tensorrt.jit_kernel_cache import CompiledKernels
from moesr.runtime.backends.tensorrt.library import Library
from moesr.runtime.devices.driver import Driver
from moesr.runtime.engine.graph_spec import Boundary, TensorSpec
from moesr.runtime.errors import EngineError, MemoryLimitError
from moesr.runtime.system.memory import ran_out_of_memory

_TYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}


def boundary_of(library: Library, engine: Any) -> Boundary:
    """Return the inputs and outputs of an engine of the library."""
    sides: dict[bool, list[TensorSpec]] = {True: [], False: []}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dims = tuple("?" if size < 0 else int(size) for size in engine.get_tensor_shape(name))
        dtype = str(engine.get_tensor_dtype(name)).rpartition(".")[2].lower()
        is_input = engine.get_tensor_mode(name) == library.module.TensorIOMode.INPUT
        sides[is_input].append(TensorSpec(name, _TYPES.get(dtype, dtype), dims))
    return Boundary(tuple(sides[True]), tuple(sides[False]))


class PlanRunner:
    """Runs an engine of the library between fixed addresses, with one execution context per batch size.

    All contexts use the same working memory. A context serves only one batch size, because a CUDA graph keeps
    the shapes and addresses that were set when it was captured.
    """

    def __init__(self, library: Library, engine: Any, path: Path, compiled: Path | None = None) -> None:
        """Make a runner.

        `compiled` is the cache of kernels that the library compiles when the plan first runs.
        """
        self._compiled = CompiledKernels(compiled)
        self._library, self._path = library, path
        self._engine: Any = engine
        self._boundary = boundary_of(library, engine)
        self._contexts: dict[int, Any] = {}
        self._addresses: Mapping[str, int] = {}
        self._driver: Driver | None = None
        self._work = 0

    @property
    def work_bytes(self) -> int:
        """The size of the working memory that a run needs."""
        return int(self._engine.device_memory_size_v2)

    def bind(self, driver: Driver, addresses: Mapping[str, int], work: int) -> None:
        """Use these addresses by tensor name from now on, and the working memory that begins at `work`."""
        self._driver, self._addresses, self._work = driver, addresses, work
        self._contexts = {}

    def enqueue(self, batch: int) -> None:
        """Add a run on the first `batch` tiles to the stream; EngineError if the library refuses it."""
        assert self._driver is not None
        first = batch not in self._contexts
        if first:
            self._contexts[batch] = self._context(batch)
        if not self._contexts[batch].execute_async_v3(self._driver.stream):
            raise self._failure("does not run")
        if first:
            self._compiled.keep()

    def _context(self, batch: int) -> Any:
        context = self._engine.create_execution_context(self._settings())
        if context is None:
            raise self._failure("cannot be prepared")
        if batch == 1 and self._engine.num_optimization_profiles > 1:
            assert self._driver is not None
            if not context.set_optimization_profile_async(1, self._driver.stream):
                raise self._failure("does not take its profile for one tile")
        if self.work_bytes:
            context.set_device_memory(self._work, self.work_bytes)
        shaped = all(context.set_input_shape(spec.name, spec.shape(batch)) for spec in self._boundary.inputs)
        names = [spec.name for spec in (*self._boundary.inputs, *self._boundary.outputs)]
        if not (shaped and all(context.set_tensor_address(name, self._addresses[name]) for name in names)):
            raise self._failure(f"does not take {batch} tiles")
        return context

    def _settings(self) -> Any:
        """Return the argument with which contexts are created, whose memory is ours.

        If the library can specialize kernels for a shape, it does so when a context is created.
        """
        trt = self._library.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        specialization = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is None:
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # with lazy specialization a CUDA graph would keep the slower generic kernels for ever
        config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        self._compiled.attach(config)
        return config

    def _failure(self, what: str) -> EngineError | MemoryLimitError:
        text = self._library.complaint()
        if ran_out_of_memory(text):
            return MemoryLimitError(
                f"{self._path.name}: no memory for its plan ({text}); close other programs that use the GPU, "
                "or lower max_batch"
            )
        return EngineError(f"{self._path.name}: its plan {what} ({text}); see moesr-doctor")

    def close(self) -> None:
        """Drop the contexts and the engine; no enqueued work may be outstanding."""
        self._contexts, self._engine = {}, None
