"""A fake TensorRT with all that the runtime uses of it, on the simulated GPU; a plan is a function's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda_simulation import POISON, SimulatedDriver

from moesr.runtime.backends.tensorrt.library import Library
from moesr.runtime.engine.graph_spec import Boundary

Row = Mapping[str, np.ndarray]


class FakeEngine:
    """A graph with a boundary that is computed by a plain function of one tile."""

    device_memory_size_v2 = 4096
    num_optimization_profiles = 2  # one for any number of tiles, and one for a single tile

    def __init__(
        self, driver: SimulatedDriver, boundary: Boundary, function: Callable[[Row], np.ndarray]
    ) -> None:
        self.driver, self.function = driver, function
        self.specs = {s.name: s for s in (*boundary.inputs, *boundary.outputs)}
        self.outputs = [s.name for s in boundary.outputs]
        self.contexts: list[FakeContext] = []
        self.caches: list[FakeRuntimeCache] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.specs)

    def get_tensor_name(self, index: int) -> str:
        return list(self.specs)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(d, str) else d for d in self.specs[name].dims)

    def get_tensor_dtype(self, name: str) -> str:
        return "DataType.FLOAT"

    def get_tensor_mode(self, name: str) -> str:
        return "OUTPUT" if name in self.outputs else "INPUT"

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        (output,) = self.outputs
        batch = next(iter(shapes.values()))[0]
        arrays = {name: self._view(name, shape, addresses) for name, shape in shapes.items()}
        out = self._view(output, self.specs[output].shape(batch), addresses)
        for i in range(batch):
            out[i] = self.function({name: array[i % len(array)] for name, array in arrays.items()})

    def _view(self, name: str, shape: tuple[int, ...], addresses: dict[str, int]) -> np.ndarray:
        return self.driver.view(addresses[name], int(np.prod(shape)), np.float32).reshape(shape)

    def create_runtime_config(self) -> SimpleNamespace:
        config = SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="LAZY")
        config.set_execution_context_allocation_strategy = lambda s: setattr(config, "allocation", s)
        config.create_runtime_cache = lambda: FakeRuntimeCache(self)
        config.set_runtime_cache = self.caches.append
        return config

    def create_execution_context(self, given: Any) -> FakeContext:
        """Create a context from a configuration, or from a strategy if the library has no other settings."""
        if not isinstance(given, str):
            assert given.dynamic_shapes_kernel_specialization_strategy == "EAGER"
            given = given.allocation
        assert given == "USER_MANAGED"
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeRuntimeCache:
    """Holds one kernel for each context that ran, and the kernels of an earlier process."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.before = engine, b""

    def deserialize(self, blob: bytes) -> bool:
        fits = blob.startswith(b"kernels")
        self.before = blob if fits else b""
        return fits

    def serialize(self) -> bytes:
        shapes = sorted({str(sorted(context.shapes.items())).encode() for context in self.engine.contexts})
        return self.before or b"kernels " + b" ".join(shapes)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.shapes, self.addresses, self.memory = engine, {}, {}, 0
        self.profile = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.memory = address

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self.engine.driver.stream and index < self.engine.num_optimization_profiles
        assert not self.shapes, "the profile must be chosen before shapes are set"
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile == 0 or shape[0] == 1
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.engine.driver.stream and self.memory
        assert self.addresses.keys() == self.engine.specs.keys()
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        memory, size = self.memory, self.engine.device_memory_size_v2

        def run() -> None:
            self.engine.driver.view(memory, size)[:] = POISON  # a run may leave any values there
            self.engine.compute(shapes, addresses)

        self.engine.driver.library_call("run plan", run)
        return True


def fake_library(
    engines: Mapping[bytes, Any] | None = None,
    version: str = "9.9",
    flavour: str = "tensorrt_rtx",
    complaint: str = "Serialization assertion failed",
) -> Library:
    """Return a library whose plans are the keys of `engines`; it reports errors for other plans."""
    errors: list[str] = []

    class Runtime:
        def __init__(self, logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            found = (engines or {}).get(data)
            if found is None:
                errors.append(complaint)
            return found

    module = SimpleNamespace(
        Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="USER_MANAGED"),
    )
    if flavour == "tensorrt_rtx":
        module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="EAGER")
    return Library(flavour, version, module, None, errors)
