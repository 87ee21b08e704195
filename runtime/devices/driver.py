"""The operations that the runtime needs of the CUDA driver: one GPU, one stream, addresses.

All work is enqueued on the stream and done in order; only `copy_out`, `wait` and `synchronize` wait for it.
`devices.cuda_driver` is the real driver. Addresses are integers, so that tests can simulate a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Block(Protocol):
    """A block of device memory."""

    @property
    def address(self) -> int:
        """The first address, a multiple of 256."""
        ...

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        ...


class Driver(Protocol):
    """One GPU and one stream, used by one thread at a time.

    Every method raises EngineError for an error of the driver and MemoryLimitError if memory ran out.
    """

    @property
    def name(self) -> str:
        """The name of the GPU."""
        ...

    @property
    def capability(self) -> int:
        """The compute capability as one number: 89 for 8.9."""
        ...

    @property
    def stream(self) -> int:
        """The handle of the stream, for libraries that enqueue work themselves."""
        ...

    @property
    def shared(self) -> dict[Any, Any]:
        """Objects that the users of this driver share, such as loaded kernels; `close` drops them."""
        ...

    def alloc(self, nbytes: int) -> Block:
        """Allocate uninitialized memory in the order of the stream."""
        ...

    def free_bytes(self) -> int:
        """The bytes that could still be allocated. Any thread may ask, during a capture too."""
        ...

    def free(self, block: Any) -> None:
        """Free a block in the order of the stream."""
        ...

    def pinned(self, nbytes: int) -> np.ndarray:
        """Pinned host memory, uint8 [nbytes], from which `copy_in` copies while the host goes on."""
        ...

    def clear(self, address: int, nbytes: int) -> None:
        """Fill memory with zeros."""
        ...

    def copy_in(self, address: int, source: np.ndarray) -> None:
        """Copy pinned memory to the device; it must not change before an event that is recorded later."""
        ...

    def copy(self, address: int, source: int, nbytes: int) -> None:
        """Copy within the device."""
        ...

    def copy_out(self, target: np.ndarray, address: int) -> None:
        """Copy to any host array, and wait for it."""
        ...

    def load(self, code: bytes, entry: str, shared_bytes: int, ptx: bool = False) -> Any:
        """Load the kernel `entry` of a cubin, or of PTX."""
        ...

    def launch(
        self,
        kernel: Any,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[np.generic],
    ) -> None:
        """Launch a kernel; pointers are np.uint64."""
        ...

    def begin_capture(self) -> None:
        """Record what is enqueued from now on into a graph, without doing it."""
        ...

    def end_capture(self) -> Any:
        """End the capture and return the graph, which can be replayed any number of times."""
        ...

    def abandon_capture(self) -> None:
        """End a capture that failed; nothing that was recorded is done. It raises nothing."""
        ...

    def replay(self, graph: Any) -> None:
        """Enqueue all work of a graph."""
        ...

    def record(self) -> Any:
        """An event after everything that is enqueued."""
        ...

    def wait(self, event: Any) -> None:
        """Wait for an event."""
        ...

    def synchronize(self) -> None:
        """Wait for everything that is enqueued."""
        ...

    def close(self) -> None:
        """Wait, then release the stream and the pinned memory."""
        ...
