"""PyTorch as a backend of the runtime, to run its loop on a GPU without an inference library.

A session runs a network of `NETWORKS` between buffers of the device, on the device's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moesr.runtime.backends import selection
from moesr.runtime.backends.base import Offer, SessionOptions
from moesr.runtime.devices.cuda import Buffer
from moesr.runtime.devices.driver import Driver
from moesr.runtime.engine.graph_spec import Boundary

NAME = "pytorch"
NETWORKS: dict[str, Callable[..., Tensor]] = {}
"""Networks by the first part of a graph's file name; they take its inputs in order and return float32."""

MAX_BATCH = 16
ONE_GRAPH = True
"""True: networks are captured in the device's CUDA graphs. False: their kernels are launched individually."""


class Session:
    """See `moesr.runtime.backends.base.Session`."""

    def __init__(self, path: Path, boundary: Boundary, network: Callable[..., Tensor]) -> None:
        self.boundary, self._path, self._network = boundary, path, network
        self.capturable = ONE_GRAPH
        self._buffers: Mapping[str, Buffer] = {}

    def bind(self, buffers: Mapping[str, Buffer], max_batch: int) -> None:
        """See `Session.bind`."""
        self._buffers = buffers

    def enqueue(self, batch: int) -> None:
        """See `Session.enqueue`; memory is allocated from this stream's pool and only used on this stream."""
        output = self._buffers[self.boundary.outputs[0].name]

        def run() -> None:
            given = [tensor_of(self._buffers[spec.name], batch) for spec in self.boundary.inputs]
            with torch.no_grad():
                tensor_of(output, batch).copy_(self._network(*given))

        on_stream(output.driver, run)

    def abort(self) -> None:
        """See `Session.abort`; nothing to do, since enqueued work ends within milliseconds."""

    def close(self) -> None:
        """See `Session.close`."""
        if self._buffers:
            next(iter(self._buffers.values())).driver.synchronize()
        self._buffers = {}


def tensor_of(buffer: Buffer, batch: int) -> Tensor:
    """Return a buffer's first `batch` tiles as a tensor over the same memory."""
    interface = {
        "shape": buffer.spec.shape(batch),
        "typestr": "<f4",
        "data": (buffer.address, False),
        "version": 3,
        "stream": 1,  # no synchronization: the caller orders the work
    }
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device="cuda")


def on_stream(driver: Driver, run: Callable[[], None]) -> None:
    """Call `run` with the driver's stream as PyTorch's current stream."""
    with torch.cuda.stream(torch.cuda.ExternalStream(driver.stream)):
        run()


def probe() -> Offer:
    """See `moesr.runtime.backends.probe`."""
    return Offer(torch.__version__, {"cuda": MAX_BATCH})


def open_session(path: Path, declared: Boundary, options: SessionOptions) -> Any:
    """See `moesr.runtime.backends.Backend.open`."""
    return Session(path, declared, NETWORKS[path.name.partition("_")[0].partition(".")[0]])


def release() -> None:
    """Do nothing: this backend keeps no resources."""


def install(networks: Mapping[str, Callable[..., Tensor]]) -> None:
    """Register this backend with the runtime, with networks for "expert" and "decoder"."""
    NETWORKS.update(networks)
    selection.BACKENDS[NAME] = __name__
