"""Binding of the kernels that surround a graph: `tile_gather`, `tile_blend` and `sampler_step`."""

from __future__ import annotations

from moesr.runtime.devices.compiled_kernels import BoundLaunch
from moesr.runtime.devices.kernel_search import AnyKernels
from moesr.runtime.devices.operator_plan import KernelLaunch

PIXEL_BYTES = (4, 2, 1)
"""Bytes per value of a canvas: float32 latents, uint16 and uint8 images."""


class LoopKernels:
    """The plans of the loop's kernels, looked up together, so that a missing one is reported at the start."""

    def __init__(self, kernels: AnyKernels) -> None:
        """Look up the plans; EngineError if one is missing."""
        self._kernels = kernels
        self._gather = {n: self._only("tile_gather", pixel_bytes=n) for n in PIXEL_BYTES}
        self._blend, self._step = self._only("tile_blend"), self._only("sampler_step")

    def _only(self, op: str, **shape: int) -> KernelLaunch:
        (step,) = self._kernels.plan(op, "fp32", shape).launches
        return step

    def gather(
        self, slots: int, tiles: int, t: int, count: int, size: tuple[int, ...], pixel_bytes: int
    ) -> BoundLaunch:
        """Return a launch over `count` rows at `slots` that fills `t` and tiles of `size` (C, h, w)."""
        channels, height, width = size
        buffers = {"slots": slots, "tiles": tiles, "t": t}
        scalars = {"slots": count, "channels": channels, "height": height, "width": width}
        return self._kernels.bind(self._gather[pixel_bytes], buffers, scalars)

    def blend(self, slots: int, tiles: int, weights: int, count: int, size: tuple[int, ...]) -> BoundLaunch:
        """Return a launch over `count` rows at `slots` that adds tiles of `size`, weighted by a window."""
        channels, height, width = size
        buffers = {"slots": slots, "tiles": tiles, "weights": weights}
        scalars = {"slots": count, "channels": channels, "height": height, "width": width}
        return self._kernels.bind(self._blend, buffers, scalars)

    def step(self, jobs: int) -> BoundLaunch:
        """Return a launch of the sampler's step for the job whose row is at `jobs`."""
        return self._kernels.bind(self._step, {"jobs": jobs}, {"jobs": 1})
