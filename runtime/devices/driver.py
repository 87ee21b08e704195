"""What the runtime needs of the CUDA driver: one GPU, one stream, addresses.

Everything is enqueued on the stream and done in order; only `copy_out`, `wait` and `synchronize` wait for it.
`devices.cuda_driver` is the real one. Addresses are integers, so that tests can simulate a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Block(Protocol):
    """Memory of the device."""

    @property
    def address(self) -> int:
        """Where it begins; 256 divides it."""
        ...

    @property
    def nbytes(self) -> int:
        """How long it is."""
        ...


class Driver(Protocol):
    """One GPU and one stream. One thread at a time uses it."""

    @property
    def name(self) -> str:
        """What the GPU is called."""
        ...

    @property
    def capability(self) -> int:
        """Compute capability as one number: 89 for 8.9."""
        ...

    @property
    def stream(self) -> int:
        """Handle of the stream, for libraries that enqueue work themselves."""
        ...

    def alloc(self, nbytes: int) -> Block:
        """Memory with anything in it, in the order of the stream; MemoryLimitError where there is none."""
        ...

    def free_bytes(self) -> int:
        """How much memory could still be taken; any thread may ask."""
        ...

    def free(self, block: Any) -> None:
        """Give memory back once all that is enqueued is done."""
        ...

    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory, uint8, that `copy_in` can read while the host goes on."""
        ...

    def clear(self, address: int, nbytes: int) -> None:
        """Fill with zeros."""
        ...

    def copy_in(self, address: int, source: np.ndarray) -> None:
        """Copy pinned memory to the device; it must not change before an event recorded later."""
        ...

    def copy(self, address: int, source: int, nbytes: int) -> None:
        """Copy within the device."""
        ...

    def copy_out(self, target: np.ndarray, address: int) -> None:
        """Copy to any host array, and wait for it."""
        ...

    def load(self, code: bytes, entry: str, shared_bytes: int, ptx: bool = False) -> Any:
        """A kernel of a cubin, or of PTX; EngineError where the driver does not take it."""
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
        """Write down what is enqueued from now on, in place of doing it."""
        ...

    def end_capture(self) -> Any:
        """What was written down, ready to be replayed any number of times."""
        ...

    def abandon_capture(self) -> None:
        """End a capture that failed."""
        ...

    def replay(self, graph: Any) -> None:
        """Enqueue all of a graph."""
        ...

    def record(self) -> Any:
        """An event after all that is enqueued."""
        ...

    def wait(self, event: Any) -> None:
        """Wait for an event."""
        ...

    def synchronize(self) -> None:
        """Wait for all that is enqueued."""
        ...

    def close(self) -> None:
        """Wait, and give the stream back."""
        ...
