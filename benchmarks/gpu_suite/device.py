"""The device section of benchmarks/gpu.py: driver, loop kernels and CUDA graphs with a graph that copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_suite.setup import Report, Setup, absent_unless_there, seconds_each
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends.selection import Backend
from moesr.runtime.devices.host import HostDevice
from moesr.runtime.devices.interface import Device, Slot
from moesr.runtime.engine.graph_spec import Boundary, TensorSpec
from moesr.runtime.sampling import noise, tiles
from moesr.runtime.sampling.samplers import Coefficients
from moesr.runtime.system.relative_error import relative_l2


class CopySession:
    """A session that copies its first input to its output, on the device's stream or on the host."""

    capturable = True

    def __init__(self, spec: TensorSpec) -> None:
        output = TensorSpec("eps", spec.dtype, spec.dims)
        self.boundary = Boundary((spec,), (output,))
        self._buffers: Mapping[str, Any] = {}

    def bind(self, buffers: Mapping[str, Any], max_batch: int) -> None:
        """See `Session.bind`."""
        self._buffers = buffers

    def enqueue(self, batch: int) -> None:
        """See `Session.enqueue`."""
        source, target = self._buffers[self.boundary.inputs[0].name], self._buffers["eps"]
        if isinstance(source, np.ndarray):
            target[:batch] = source[:batch]
        else:
            nbytes = 4 * int(np.prod(source.spec.shape(batch)))
            source.driver.copy(target.address, source.address, nbytes)

    def abort(self) -> None:
        """See `Session.abort`."""

    def close(self) -> None:
        """See `Session.close`."""


def measure_device(setup: Setup, report: Report) -> None:
    """Compare all operations of the device with the host's, with and without CUDA graphs, and time a tick."""
    absent_unless_there("cuda.core")
    want = steps_of_copies(HostDevice(), setup.tile // 4)
    for use_graphs, name in ((True, "CUDA graphs"), (False, "launch by launch")):
        backend = Backend("pytorch", SessionOptions("cuda", cuda_graphs=use_graphs), max(setup.batches))
        device = backend.device(setup.engine)
        got = steps_of_copies(device, setup.tile // 4)
        for what in want:
            report.check(f"device, {name}: {what}", relative_l2(got[what], want[what]), 1e-5)
        seconds = cost_of_a_tick(device, setup.tile // 4, report)
        report.row(f"device, {name}", "tick without a network", 1e6 * seconds, "us")
        device.close()


def steps_of_copies(device: Device, side: int, steps: int = 5) -> dict[str, np.ndarray]:
    """Return a device's results for all kinds of images and a few steps, over four overlapping tiles."""
    rng, origins = np.random.default_rng(3), [(0, 0), (0, side // 2), (side // 2, 0), (side // 2, side // 2)]
    size, found = side + side // 2, {}
    weights = tiles.gaussian_weights(side)
    c = Coefficients(*map(np.float32, (0.7, 0.2, 0.1)))
    images = {
        "8 bits": rng.integers(0, 256, (size, size, 3), np.uint8),
        "16 bits": rng.integers(0, 65536, (size, size, 3), np.uint16),
    }
    spec = TensorSpec("z_t", "float32", ("B", 3, side, side))
    session = CopySession(spec)
    buffers = {s.name: device.buffer(s, 4) for s in (*session.boundary.inputs, *session.boundary.outputs)}
    session.bind(buffers, 4)
    z = device.canvas((3, size, size))
    device.gaussian(z, 11, noise.INITIAL_NOISE)
    found["noise"] = device.download(z).copy()
    for name, source in {**{k: device.upload(v) for k, v in images.items()}, "latent": z}.items():
        mean = device.mean((3, size, size), origins, weights)
        slots = [Slot({"z_t": source}, {}, mean, y, x) for y, x in origins]
        for step in range(steps):
            for _ in range(1 if name != "latent" else 2):
                device.tick(slots[:2], session, buffers)
                device.tick(slots[2:], session, buffers)
            if name == "latent":
                device.advance(z, mean, c, 11, step)
            elif step < steps - 1:
                device.advance(
                    device.canvas((3, size, size)), mean, c, 11, step
                )  # also clears the sums of `mean`
        found[f"mean of {name}"] = device.download(mean).copy()
    found["latent after its steps"] = device.download(z).copy()
    return {name: value for name, value in found.items() if np.linalg.norm(value)}


def cost_of_a_tick(device: Device, side: int, report: Report) -> float:
    """Measure the seconds of gathering, copying and blending one tile."""
    session = CopySession(TensorSpec("z_t", "float32", ("B", 3, side, side)))
    buffers = {s.name: device.buffer(s, 1) for s in (*session.boundary.inputs, *session.boundary.outputs)}
    session.bind(buffers, 1)
    mean = device.mean((3, side, side), [(0, 0)], tiles.gaussian_weights(side))
    slots = [Slot({"z_t": device.canvas((3, side, side))}, {}, mean, 0, 0)]
    return seconds_each(lambda: device.tick(slots, session, buffers), lambda: device.finite(mean))
