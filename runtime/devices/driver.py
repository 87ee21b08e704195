"""The operations of the CUDA driver that the runtime needs: one GPU, one stream, addresses.

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
        """Objects that all users of this driver share, such as loaded kernels; `close` drops them."""
        ...

    def alloc(self, nbytes: int) -> Block:
        """Allocate uninitialized memory in stream order."""
        ...

    def free_bytes(self) -> int:
        """Return the bytes that can still be allocated. Any thread may call this, even during a capture."""
        ...

    def free(self, block: Any) -> None:
        """Free a block in stream order."""
        ...

    def pinned(self, nbytes: int) -> np.ndarray:
        """Return pinned host memory, uint8 [nbytes], from which `copy_in` copies while the host continues."""
        ...

    def clear(self, address: int, nbytes: int) -> None:
        """Fill memory with zeros."""
        ...

    def copy_in(self, address: int, source: np.ndarray) -> None:
        """Copy pinned memory to the device.

        It must not change before an event that is recorded after this call.
        """
        ...

    def copy(self, address: int, source: int, nbytes: int) -> None:
        """Copy within the device."""
        ...

    def copy_out(self, target: np.ndarray, address: int) -> None:
        """Copy to any host array, and wait for the copy."""
        ...

    def load(self, code: bytes, entry: str, shared_bytes: int, ptx: bool = False) -> Any:
        """Load the kernel `entry` from a cubin or from PTX."""
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
        """Record what is enqueued from now on into a graph, without running it."""
        ...

    def end_capture(self) -> Any:
        """End the capture and return the graph, which can be replayed any number of times."""
        ...

    def abandon_capture(self) -> None:
        """End a capture that failed; nothing that was recorded is run. This raises no error."""
        ...

    def replay(self, graph: Any) -> None:
        """Enqueue all work of a graph."""
        ...

    def record(self) -> Any:
        """Record an event after all work that is enqueued."""
        ...

    def wait(self, event: Any) -> None:
        """Wait for an event."""
        ...

    def wait_for(self, stream: int) -> None:
        """Make later work wait for all work that is enqueued on another stream, given by its handle."""
        ...

    def signal(self, stream: int) -> None:
        """Make later work on another stream wait for all work that is enqueued here."""
        ...

    def synchronize(self) -> None:
        """Wait for all work that is enqueued."""
        ...

    def close(self) -> None:
        """Wait for all work, then release the stream and the pinned memory."""
        ...
