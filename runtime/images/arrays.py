"""Arrays of other libraries, on the host and on a GPU, through DLPack and `__cuda_array_interface__`.

No library is imported here: an array's own module is found among those that are loaded. A shape is [H, W],
[H, W, C] or [B, C, H, W]; values are uint8, uint16, or float16 or float32 of 0 to 1.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from moesr.runtime.errors import InputError

DTYPES = ("uint8", "uint16", "float16", "float32")
_CPU, _GPU = (1, 3), (2, 13)  # DLPack's device types: memory of the host, and of CUDA
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float"}
_STREAM_PER_THREAD = 2  # CUDA's handle of the default stream of the calling thread
_DEFAULT_STREAM = 1  # CUDA's handle of the legacy default stream


@dataclass(frozen=True)
class GpuArray:
    """An array in a GPU's memory; `strides` count elements. `owner` keeps the memory."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int | None  # number of the GPU; None if the array does not tell
    owner: Any

    def image(self, index: int) -> GpuArray:
        """Return image `index` of a batch [B, C, H, W], as [C, H, W]."""
        at = self.address + index * self.strides[0] * np.dtype(self.dtype).itemsize
        return GpuArray(at, self.shape[1:], self.strides[1:], self.dtype, self.device, self.owner)


def is_foreign(image: Any) -> bool:
    """Return True if the image is an array of another library than NumPy."""
    known = hasattr(image, "__dlpack_device__") or _interface(image) is not None
    return known and not isinstance(image, np.ndarray)


def on_gpu(image: Any) -> GpuArray | None:
    """Return the array in a GPU's memory that `image` is; None if it is on the host.

    Nothing is copied, and nothing is waited for. InputError if the array cannot be used.
    """
    kind, device = _place(image)
    if kind in _CPU:
        return None
    if kind not in _GPU:
        raise InputError(
            f"got an array on a device of DLPack's type {kind}; pass one on a CUDA GPU or the CPU"
        )
    image = image.detach() if hasattr(image, "detach") else image  # PyTorch shares no tensor with a gradient
    interface = _interface(image)
    try:
        found = _of_interface(image, interface, device) if interface else _of_capsule(image, device)
    except (BufferError, RuntimeError, TypeError) as error:
        raise InputError(
            f"got {type(image).__name__} on a GPU that cannot be read ({error}); expected {', '.join(DTYPES)}"
        ) from error
    return _checked(found)


def to_host(image: Any) -> np.ndarray:
    """Return an array of the host as a NumPy array over the same memory; InputError if that is impossible."""
    try:
        return np.from_dlpack(image.detach() if hasattr(image, "detach") else image)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"got {type(image).__name__} that NumPy cannot read ({error}); expected {', '.join(DTYPES)}"
        ) from error


def like(image: Any, array: np.ndarray) -> Any:
    """Return a NumPy array as an array of the library that `image` comes from, without a copy if it can."""
    module = _module(image)
    make = None if module in (None, np) else getattr(module, "from_dlpack", None)
    return make(array) if make else array


def empty_like(image: Any, shape: tuple[int, ...]) -> Any:
    """Return an uninitialized array of the same library, GPU and dtype; the library allocates it.

    InputError if the library is not one of PyTorch, CuPy, PyCUDA and Numba.
    """
    module = _module(image)
    name = module.__name__ if module else ""
    if name == "torch":
        return image.new_empty(shape)
    if module and name == "cupy":
        return module.empty(shape, dtype=image.dtype)
    if name == "numba":
        return sys.modules["numba.cuda"].device_array(shape, dtype=image.dtype)
    try:
        return type(image)(shape, image.dtype)  # pycuda.gpuarray.GPUArray
    except TypeError as error:
        raise InputError(
            f"results cannot be made as {type(image).__name__} of {name or 'an unknown library'}; pass an "
            "array of PyTorch, CuPy, PyCUDA or Numba, such as torch.from_dlpack(image)"
        ) from error


class StreamHandle(int):
    """The handle of a stream, with the object that it is from.

    A library may destroy a stream once nothing refers to its object, and a submitted image uses it later.
    """

    owner: Any = None


def stream_of(image: Any, given: Any = None) -> StreamHandle:
    """Return the handle of the stream on which a caller works.

    It is the given one (a number, or a stream object of PyTorch, CuPy, PyCUDA, Numba or cuda.core), else the
    array's own, else the current stream of its library, else the default stream.
    """
    if given is not None:
        return _handle(given)
    interface = _interface(image) or {}
    if interface.get("stream"):
        return _handle(interface["stream"])
    module = _module(image)
    cuda = getattr(module, "cuda", None)
    if module is not None and module.__name__ == "torch" and cuda:
        return _handle(cuda.current_stream(image.device))
    if module is not None and module.__name__ == "cupy" and cuda:
        return _handle(cuda.get_current_stream())
    return _handle(_DEFAULT_STREAM)


def _handle(stream: Any) -> StreamHandle:
    """Return a stream's handle as a number; the default stream of CUDA's runtime, 0, is 1.

    The handle of the default stream per thread would name another stream in the worker's thread. Each of
    these streams waits for the default stream of all threads, and the reverse, so it takes their place.
    """
    owner, protocol = stream, getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        stream = protocol()[1]
    for name in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, name):
            stream = getattr(stream, name)
            break
    try:
        handle = int(getattr(stream, "value", stream) or 0)
    except (TypeError, ValueError) as error:
        raise InputError(f"got a stream of type {type(stream).__name__}, expected its handle") from error
    made = StreamHandle(_DEFAULT_STREAM if handle in (0, _STREAM_PER_THREAD) else handle)
    made.owner = owner
    return made


def _interface(image: Any) -> dict[str, Any] | None:
    """Return `__cuda_array_interface__`; None if the array has none, or if its library refuses."""
    try:
        return getattr(image, "__cuda_array_interface__", None)
    except (RuntimeError, TypeError):
        return None


def _place(image: Any) -> tuple[int, int | None]:
    """Return DLPack's type of the device, and the device's number if it is known."""
    if hasattr(image, "__dlpack_device__"):
        kind, number = image.__dlpack_device__()
        return int(kind), int(number)
    return _GPU[0], None


def _module(image: Any) -> ModuleType | None:
    """Return the top-level module of an array's library."""
    return sys.modules.get(type(image).__module__.partition(".")[0])


def _checked(found: GpuArray) -> GpuArray:
    if found.dtype not in DTYPES:
        raise InputError(f"got an array of {found.dtype} on a GPU, expected {', '.join(DTYPES)}")
    if 0 in found.shape:
        raise InputError(f"got an array of shape {found.shape}, expected some pixels")
    return found


def _of_interface(image: Any, interface: dict[str, Any], device: int | None) -> GpuArray:
    """Read `__cuda_array_interface__` (version 2 or 3)."""
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    steps = _dense(shape) if strides is None else tuple(step // dtype.itemsize for step in strides)
    if not dtype.isnative and dtype.itemsize > 1:
        raise InputError(f"got an array of {dtype} on a GPU, expected one in this machine's byte order")
    return GpuArray(int(interface["data"][0]), shape, steps, dtype.name, device, image)


class _DLTensor(ctypes.Structure):
    """`DLTensor` of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _of_capsule(image: Any, device: int | None) -> GpuArray:
    """Read a DLPack capsule, which is kept and so releases the memory when it is collected.

    Stream -1 asks the library for no synchronization, since the order of streams is established here.
    """
    capsule = image.__dlpack__(stream=-1)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else _dense(shape)
    dtype = f"{_DLPACK_KINDS.get(tensor.code, 'type ' + str(tensor.code) + ' of ')}{tensor.bits}"
    address = (tensor.data or 0) + tensor.byte_offset
    return GpuArray(address, shape, strides, dtype, device, (image, capsule))


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a dense array in elements."""
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))
