"""The CUDA driver. No other module uses `cuda.core`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moesr.runtime.devices import current_gpu
from moesr.runtime.errors import EngineError, MemoryLimitError
from moesr.runtime.system import memory

INSTALL = "install it with: pip install 'moesr[cuda]' (or 'moesr[tensorrt]', 'moesr[tensorrt-rtx]')"
_NO_MEMORY = "OUT_OF_MEMORY"  # part of the driver's error name
_NO_GRAPH = "a CUDA graph could not be captured; run with --no-cuda-graphs"
_FREE_MEMORY_ADVICE = "close other programs on the GPU, lower max_batch, or use an engine with smaller tiles"
_FINAL = (
    "ILLEGAL_ADDRESS", "ILLEGAL_INSTRUCTION", "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC",
    "LAUNCH_FAILED", "LAUNCH_TIMEOUT", "HARDWARE_STACK_ERROR", "CUDA_ERROR_ASSERT", "ECC_UNCORRECTABLE",
    "CONTEXT_IS_DESTROYED", "EXTERNAL_DEVICE", "CONTAINED",
)  # fmt: skip
"""Parts of the names of errors after which every further call of the process fails."""
_START_AGAIN = (
    "this program cannot use the GPU any longer, so start it again; if that happens again, run it with "
    "CUDA_LAUNCH_BLOCKING=1 and --no-cuda-graphs, and report the message"
)
_SHARED_WITHOUT_ASKING = 48 << 10  # bytes of dynamic shared memory that any kernel may use


def library() -> Any:
    """Return the `cuda.core` package; EngineError if it is not installed, or too old."""
    try:
        core = importlib.import_module("cuda.core")
    except ImportError as error:
        raise EngineError(f"cuda-core does not load ({error}); {INSTALL}") from error
    if not hasattr(core, "Device"):  # before 0.4 all of it was in `cuda.core.experimental`
        version = getattr(core, "__version__", "of an unknown version")
        raise EngineError(f"cuda-core {version} is too old; update it: pip install --upgrade 'moesr[cuda]'")
    return core


def open_device(index: int) -> Any:
    """Open a GPU and make it current in the calling thread; EngineError says what is missing."""
    core = library()
    try:
        device = core.Device(index)
        device.set_current()
        current_gpu.made_current.index = index
    except Exception as error:  # RuntimeError without a driver, CUDAError or ValueError without a GPU
        raise EngineError(
            f"no GPU cuda:{index} ({_text(error)}); install NVIDIA's driver and check that nvidia-smi lists "
            "the GPU, or choose --device cpu"
        ) from error
    return device


def device_capability(device: Any) -> int:
    """Return the compute capability of an opened GPU as one number: 89 for 8.9, 120 for 12.0."""
    with _explained("the GPU does not report its compute capability"):
        major, minor = device.compute_capability
    return 10 * int(major) + int(minor)


def driver_version() -> str:
    """Return the latest CUDA release that the driver supports, such as "13.2".

    A device must have been opened before.
    """
    driver = importlib.import_module("cuda.bindings.driver")
    status, number = driver.cuDriverGetVersion()
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(f"the driver does not report its version ({status.name}); install it again")
    return f"{number // 1000}.{number % 1000 // 10}"


def memory_bytes() -> tuple[int, int]:
    """Return the free and the total bytes of the GPU that is current in the calling thread."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        status, free, total = driver.cuMemGetInfo()
    except (ImportError, RuntimeError) as error:
        raise EngineError(f"there is no driver that reports the free memory ({error}); {INSTALL}") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(f"the driver does not report the free memory ({status.name}); see moesr-doctor")
    return int(free), int(total)


class _Block:
    """A buffer of the library with its address."""

    def __init__(self, buffer: Any) -> None:
        self.buffer, self.address, self.nbytes = buffer, int(buffer.handle), int(buffer.size)


class CudaDriver:
    """See `moesr.runtime.devices.driver.Driver`."""

    def __init__(self, index: int = 0) -> None:
        """Open GPU number `index`; EngineError if there is no such GPU."""
        self._core, self._device, self._index = library(), open_device(index), index
        self.shared: dict[Any, Any] = {}
        self._pinned: list[Any] = []
        self._builder: Any = None
        self._last_free_bytes: int | None = None
        with _explained():
            self._stream = self._device.create_stream()
            self._pool = self._core.DeviceMemoryResource(index)
            self._pinned_pool = self._core.LegacyPinnedMemoryResource()
            self.name, self.stream = str(self._device.name), int(self._stream.handle)
        self.capability = device_capability(self._device)

    def _on(self) -> Any:
        """Return the stream, after making the device current in the calling thread."""
        if getattr(current_gpu.made_current, "index", None) != self._index:
            with _explained():
                self._device.set_current()
            current_gpu.made_current.index = self._index
        return self._stream

    def alloc(self, nbytes: int) -> _Block:
        """See `Driver.alloc`."""
        stream = self._on()
        with _explained("the GPU failed", f"no {memory.readable(nbytes)} free on {self.name}"):
            return _Block(self._pool.allocate(nbytes, stream=stream))

    def free_bytes(self) -> int:
        """See `Driver.free_bytes`; the driver's free memory plus the unused part of the pool.

        The driver forbids these queries while any thread captures in the global mode, as ONNX Runtime does,
        and would end that capture; a thread in the relaxed mode may make them. If the driver still refuses,
        the previous answer is returned.
        """
        try:
            with current_gpu.kept(), _relaxed(), _explained():
                self._on()
                held = self._pool.attributes
                unused = int(held.reserved_mem_current) - int(held.used_mem_current)
                self._last_free_bytes = memory_bytes()[0] + max(unused, 0)
        except EngineError:
            if self._last_free_bytes is None:
                raise
        return self._last_free_bytes

    def free(self, block: _Block) -> None:
        """See `Driver.free`."""
        with _explained():
            block.buffer.close(self._on())

    def pinned(self, nbytes: int) -> np.ndarray:
        """See `Driver.pinned`."""
        self._on()
        with _explained("pinned memory failed", f"no {memory.readable(nbytes)} of pinned memory"):
            buffer = self._pinned_pool.allocate(nbytes)
            self._pinned.append(buffer)
            return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(int(buffer.handle)))

    def clear(self, address: int, nbytes: int) -> None:
        """See `Driver.clear`."""
        with _explained():
            self._view(address, nbytes).fill(0, stream=self._on())

    def copy_in(self, address: int, source: np.ndarray) -> None:
        """See `Driver.copy_in`."""
        with _explained():
            host = self._view(source.ctypes.data, source.nbytes)
            self._view(address, source.nbytes).copy_from(host, stream=self._on())

    def copy(self, address: int, source: int, nbytes: int) -> None:
        """See `Driver.copy`."""
        with _explained():
            self._view(address, nbytes).copy_from(self._view(source, nbytes), stream=self._on())

    def copy_out(self, target: np.ndarray, address: int) -> None:
        """See `Driver.copy_out`."""
        stream = self._on()
        with _explained():
            host = self._view(target.ctypes.data, target.nbytes)
            host.copy_from(self._view(address, target.nbytes), stream=stream)
            stream.sync()

    def load(self, code: bytes, entry: str, shared_bytes: int, ptx: bool = False) -> Any:
        """See `Driver.load`."""
        self._on()
        make = self._core.ObjectCode.from_ptx if ptx else self._core.ObjectCode.from_cubin
        with _explained(f"{entry}: the driver does not accept this kernel"):
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
        with _explained("a kernel could not be launched"):
            config = self._core.LaunchConfig(grid=tuple(grid), block=threads, shmem_size=shared_bytes)
            self._core.launch(self._builder or self._on(), config, kernel, *arguments)

    def begin_capture(self) -> None:
        """See `Driver.begin_capture`. In the relaxed mode other threads can still use the driver."""
        with _explained(_NO_GRAPH):
            builder = self._on().create_graph_builder()
            try:
                builder.begin_building("relaxed")
            except Exception:
                _close(builder)
                raise
        self._builder = builder

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
        if builder is not None:
            _close(builder)

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

    def wait_for(self, stream: int) -> None:
        """See `Driver.wait_for`."""
        with _explained("the caller's stream cannot be waited for"):
            self._on().wait(self._core.Stream.from_handle(stream))

    def signal(self, stream: int) -> None:
        """See `Driver.signal`."""
        with _explained("the caller's stream cannot wait"):
            self._core.Stream.from_handle(stream).wait(self._on())

    def synchronize(self) -> None:
        """See `Driver.synchronize`."""
        with _explained():
            self._on().sync()

    def close(self) -> None:
        """See `Driver.close`."""
        with _explained(), contextlib.ExitStack() as steps:  # all of them, even after an error of the GPU
            for step in (self._stream.close, *(buffer.close for buffer in self._pinned)):
                steps.callback(step)
            self._pinned = []
            self.shared.clear()
            self.synchronize()

    def _view(self, address: int, nbytes: int) -> Any:
        return self._core.Buffer.from_handle(address, nbytes)


def _close(builder: Any) -> None:
    """End a capture; the errors of an invalid capture have been reported before."""
    with contextlib.suppress(Exception):
        builder.close()


@contextlib.contextmanager
def _relaxed() -> Iterator[None]:
    """Put the calling thread into the relaxed capture mode during a `with` block."""
    driver = importlib.import_module("cuda.bindings.driver")
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    status, before = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    try:
        yield
    finally:
        if status == driver.CUresult.CUDA_SUCCESS:
            driver.cuThreadExchangeStreamCaptureMode(before)


@contextlib.contextmanager
def _explained(what: str = "the GPU failed", no_memory: str = "no memory free on the GPU") -> Iterator[None]:
    """Convert the library's errors, which have no common base class, into ours."""
    try:
        yield
    except (EngineError, MemoryLimitError):
        raise
    except Exception as error:
        text = _text(error)
        if _NO_MEMORY in text:
            raise MemoryLimitError(f"{no_memory} ({text}); {_FREE_MEMORY_ADVICE}") from error
        advice = _START_AGAIN if any(name in text for name in _FINAL) else "see moesr-doctor"
        raise EngineError(f"{what} ({text}); {advice}") from error


def _text(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.300}" or type(error).__name__
