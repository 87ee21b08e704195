"""The CUDA driver: the one module that touches `cuda.core`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moesr.runtime.errors import EngineError, MemoryLimitError
from moesr.runtime.system import memory

INSTALL = "install it with: pip install 'moesr[tensorrt]' (or 'moesr[tensorrt-rtx]')"
_NO_MEMORY = "OUT_OF_MEMORY"  # in the name of the driver's error
_NO_GRAPH = "a CUDA graph could not be made; run with --no-cuda-graphs"
_SHARED_WITHOUT_ASKING = 48 << 10  # bytes of dynamic shared memory that any kernel may take


def library() -> Any:
    """The `cuda.core` package; EngineError where it is not installed."""
    try:
        return importlib.import_module("cuda.core")
    except ImportError as error:
        raise EngineError(f"cuda-core does not load ({error}); {INSTALL}") from error


def open_device(index: int) -> Any:
    """The library's handle of a GPU, made the calling thread's; EngineError saying what is missing."""
    core = library()
    try:
        device = core.Device(index)
        device.set_current()
    except Exception as error:  # RuntimeError without a driver, CUDAError or ValueError without a GPU
        raise EngineError(
            f"no GPU cuda:{index} ({_text(error)}); install NVIDIA's driver and see that nvidia-smi lists "
            "the GPU, or choose --device cpu"
        ) from error
    return device


def device_capability(device: Any) -> int:
    """The compute capability of an opened GPU as one number: 89 for 8.9, 120 for 12.0."""
    major, minor = device.compute_capability
    return 10 * major + minor


def driver_version() -> str:
    """The latest CUDA that the driver knows, such as "13.2"; a device has been opened before."""
    driver = importlib.import_module("cuda.bindings.driver")
    status, number = driver.cuDriverGetVersion()
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(f"the driver does not tell its version ({status.name}); install it anew")
    return f"{number // 1000}.{number % 1000 // 10}"


def memory_bytes() -> tuple[int, int]:
    """Bytes that are free on the GPU of the calling thread, and all that it has."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        status, free, total = driver.cuMemGetInfo()
    except (ImportError, RuntimeError) as error:
        raise EngineError(f"there is no driver to tell what memory is free ({error}); {INSTALL}") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(f"the driver does not tell what memory is free ({status.name}); see moesr-doctor")
    return int(free), int(total)


class _Block:
    """A buffer of the library with its address at hand."""

    def __init__(self, buffer: Any) -> None:
        self.buffer, self.address, self.nbytes = buffer, int(buffer.handle), int(buffer.size)


class CudaDriver:
    """See `moesr.runtime.devices.driver.Driver`."""

    def __init__(self, index: int = 0) -> None:
        """Open GPU number `index`; EngineError where there is none."""
        self._core, self._device = library(), open_device(index)
        self._thread = threading.get_ident()
        self._stream = self._device.create_stream()
        self._pool = self._core.DeviceMemoryResource(index)
        self._pinned_pool = self._core.LegacyPinnedMemoryResource()
        self._pinned: list[Any] = []
        self._builder: Any = None
        self.name, self.stream = str(self._device.name), int(self._stream.handle)
        self.capability = device_capability(self._device)

    def _on(self) -> Any:
        """The stream, the device being the calling thread's."""
        if threading.get_ident() != self._thread:
            self._device.set_current()
            self._thread = threading.get_ident()
        return self._stream

    def alloc(self, nbytes: int) -> _Block:
        """See `Driver.alloc`."""
        try:
            return _Block(self._pool.allocate(nbytes, stream=self._on()))
        except Exception as error:
            if _NO_MEMORY not in _text(error):  # of an earlier launch: errors come late
                raise EngineError(_failed("the GPU failed", error)) from error
            raise MemoryLimitError(
                f"no {memory.readable(nbytes)} free on {self.name} ({_text(error)}); close what else uses "
                "the GPU, lower max_batch, or use a smaller image or an engine with smaller tiles"
            ) from error

    def free_bytes(self) -> int:
        """See `Driver.free_bytes`: what the driver has, and what the pool keeps of what was freed."""
        self._on()
        held = self._pool.attributes
        return memory_bytes()[0] + max(int(held.reserved_mem_current) - int(held.used_mem_current), 0)

    def free(self, block: _Block) -> None:
        """See `Driver.free`."""
        with _explained():
            block.buffer.close(self._on())

    def pinned(self, nbytes: int) -> np.ndarray:
        """See `Driver.pinned`."""
        self._on()
        with _explained(f"no {memory.readable(nbytes)} of pinned memory"):
            buffer = self._pinned_pool.allocate(nbytes)
        self._pinned.append(buffer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(buffer.handle)))

    def clear(self, address: int, nbytes: int) -> None:
        """See `Driver.clear`."""
        stream = self._on()
        with _explained():
            self._view(address, nbytes).fill(0, stream=stream)

    def copy_in(self, address: int, source: np.ndarray) -> None:
        """See `Driver.copy_in`."""
        stream, host = self._on(), self._view(source.ctypes.data, source.nbytes)
        with _explained():
            self._view(address, source.nbytes).copy_from(host, stream=stream)

    def copy(self, address: int, source: int, nbytes: int) -> None:
        """See `Driver.copy`."""
        stream = self._on()
        with _explained():
            self._view(address, nbytes).copy_from(self._view(source, nbytes), stream=stream)

    def copy_out(self, target: np.ndarray, address: int) -> None:
        """See `Driver.copy_out`."""
        stream, host = self._on(), self._view(target.ctypes.data, target.nbytes)
        with _explained():
            host.copy_from(self._view(address, target.nbytes), stream=stream)
            stream.sync()

    def load(self, code: bytes, entry: str, shared_bytes: int, ptx: bool = False) -> Any:
        """See `Driver.load`."""
        self._on()
        make = self._core.ObjectCode.from_ptx if ptx else self._core.ObjectCode.from_cubin
        with _explained(f"{entry}: the driver does not take this kernel"):
            kernel = make(code).get_kernel(entry)
            if shared_bytes > _SHARED_WITHOUT_ASKING:
                self._allow_shared(kernel, shared_bytes)
        return kernel

    def _allow_shared(self, kernel: Any, shared_bytes: int) -> None:
        driver = importlib.import_module("cuda.bindings.driver")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        index = driver.CUdevice(self._device.device_id)
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, index)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{shared_bytes} bytes of shared memory: {status.name}")

    def launch(
        self,
        kernel: Any,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[np.generic],
    ) -> None:
        """See `Driver.launch`."""
        config = self._core.LaunchConfig(grid=tuple(grid), block=threads, shmem_size=shared_bytes)
        with _explained("a kernel could not be launched"):
            self._core.launch(self._builder or self._on(), config, kernel, *arguments)

    def begin_capture(self) -> None:
        """See `Driver.begin_capture`."""
        with _explained(_NO_GRAPH):
            self._builder = self._on().create_graph_builder()
            self._builder.begin_building("relaxed")  # other threads may load graphs meanwhile

    def end_capture(self) -> Any:
        """See `Driver.end_capture`."""
        with _explained(_NO_GRAPH):
            try:
                graph = self._builder.end_building().complete()
            finally:
                self.abandon_capture()
            graph.upload(self._stream)
        return graph

    def abandon_capture(self) -> None:
        """See `Driver.abandon_capture`."""
        builder, self._builder = self._builder, None
        with contextlib.suppress(Exception):  # that the capture is invalid is known by then
            builder.close()

    def replay(self, graph: Any) -> None:
        """See `Driver.replay`."""
        with _explained():
            graph.launch(self._on())

    def record(self) -> Any:
        """See `Driver.record`."""
        with _explained():
            return self._on().record()

    def wait(self, event: Any) -> None:
        """See `Driver.wait`."""
        self._on()
        with _explained():
            if not event.is_done:
                event.sync()

    def synchronize(self) -> None:
        """See `Driver.synchronize`."""
        with _explained():
            self._on().sync()

    def close(self) -> None:
        """See `Driver.close`."""
        self.synchronize()
        for buffer in self._pinned:
            buffer.close()
        self._pinned = []
        self._stream.close()

    def _view(self, address: int, nbytes: int) -> Any:
        return self._core.Buffer.from_handle(address, nbytes)


@contextlib.contextmanager
def _explained(what: str = "the GPU failed") -> Iterator[None]:
    """Turn the library's errors, which have no base of their own, into EngineError."""
    try:
        yield
    except Exception as error:
        raise EngineError(_failed(what, error)) from error


def _failed(what: str, error: Exception) -> str:
    return f"{what} ({_text(error)}); see moesr-doctor"


def _text(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.300}" or type(error).__name__
