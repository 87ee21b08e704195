"""Arrays in the memory of the simulated GPU, with the protocols by which libraries exchange them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from cuda_simulation import SimulatedDriver

STREAM = 77


class GPUArray:
    """An array as PyCUDA has it: `type(array)(shape, dtype)` allocates another one."""

    driver: SimulatedDriver
    device = 0

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.strides = np.empty(shape, dtype).strides
        self.address = self.driver.place(np.full(max(self.nbytes, 1), 0xAB, np.uint8))

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def memory(self) -> np.ndarray:
        """The values, which the simulated GPU computes late."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        data = self.driver.view(self.address, last + self.dtype.itemsize)
        return np.ndarray(self.shape, self.dtype, data.data, 0, self.strides)

    @classmethod
    def of(cls, values: np.ndarray, unaligned: int = 0) -> GPUArray:
        """A copy of an array, with its strides; it begins `unaligned` elements after an aligned address."""
        order = np.argsort(values.strides)[::-1]
        made = cls(values.shape, values.dtype)
        room = np.full(values.nbytes + 64 * values.itemsize, 0xAB, np.uint8)
        made.address = cls.driver.place(room) + unaligned * values.itemsize
        dense = np.empty([values.shape[i] for i in order], values.dtype).strides
        made.strides = tuple(dense[list(order).index(i)] for i in range(values.ndim))
        made.memory[...] = values
        return made


class InterfaceArray(GPUArray):
    """An array with `__cuda_array_interface__`."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3,
            "strides": self.strides, "stream": STREAM,
        }  # fmt: skip


class CapsuleArray(GPUArray):
    """An array with DLPack alone."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: int) -> Any:
        assert stream == -1  # no synchronization by the library
        size, rank = self.dtype.itemsize, len(self.shape)
        self._kept = (ctypes.c_int64 * (2 * rank))(*self.shape, *(step // size for step in self.strides))
        place = ctypes.addressof(self._kept)
        code = {"u": 1, "f": 2, "i": 0}[self.dtype.kind]
        head = np.zeros(6, np.uint64)
        head[0] = self.address
        small = np.zeros(12, np.uint8)
        small[:12] = np.frombuffer(np.array([2, self.device, rank], np.int32).tobytes(), np.uint8)
        raw = head[:1].tobytes() + small.tobytes() + bytes([code, 8 * size, 1, 0])
        raw += np.array([place, place + 8 * rank, 0], np.uint64).tobytes()
        self._tensor = ctypes.create_string_buffer(raw, len(raw))
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self._tensor), b"dltensor", None)
