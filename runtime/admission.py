"""Memory for images: an estimate before any work, and room kept for all that are in flight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime import memory
from moesr.runtime.errors import MemoryLimitError
from moesr.runtime.framing import frame_of
from moesr.runtime.jobs import Job
from moesr.runtime.manifest import Manifest

HELD, OPENING = 2.0, 3.5
"""Memory of a graph over its weights in float32, once open and while it opens: kernels are kept transformed.

Measured on the full-width networks with ONNX Runtime on a CPU.
"""

_BYTES_PER_PIXEL = 40  # of output: LR image resized, decoded sums, weights, one colour plane, result, latents


@dataclass(eq=False)
class Reservation:
    """Memory that an image may take; it stands until the image's job is done, or is let go."""

    count: int  # bytes
    job: Job | None = None
    dropped: bool = False

    @property
    def stands(self) -> bool:
        """Whether the memory may still be taken: that of a finished job is taken already."""
        return not self.dropped and not (self.job and self.job.done)


class Admission:
    """Decides whether one more image fits into memory. Call it under one lock."""

    def __init__(
        self,
        manifest: Manifest,
        directory: Path,
        target: str,
        max_batch: int,
        loaded: Callable[[], frozenset[str]],
        *,
        shared: bool = True,
    ) -> None:
        """`loaded` tells the roles of the graphs in memory; `shared`: their working memory is one."""
        self._manifest, self._loaded = manifest, loaded
        self._weights = {r: _weight_bytes(manifest, directory, r, target) for r in manifest.graphs}
        work = sorted(_activation_bytes(manifest, r, max_batch) for r in manifest.graphs)
        free = memory.available_bytes()
        self.keep_all = free is None or HELD * sum(self._weights.values()) <= free // 2
        self._work = work[-1] if shared else sum(work if self.keep_all else work[-2:])
        self.warm = False  # whether the graphs have taken their working memory
        self._reservations: list[Reservation] = []

    def reserve(self, height: int, width: int) -> Reservation | None:
        """Room for an image of `height` x `width` LR pixels; None where it has to wait for those in flight.

        Raises MemoryLimitError where it would not fit with nothing else in flight.
        """
        self._reservations = [r for r in self._reservations if r.stands]
        count = image_bytes(self._manifest, height, width)
        need = count + self._engine_bytes()
        taken = sum(r.count for r in self._reservations)
        free = memory.available_bytes()
        if free is None or need + taken <= free:
            self._reservations.append(Reservation(count))
            return self._reservations[-1]
        if taken:
            return None
        scale = self._manifest.scale
        rows, columns = frame_of(self._manifest, height, width).image
        through = "" if rows == height * scale else f", through {columns}x{rows},"
        raise MemoryLimitError(
            f"{width}x{height} to {width * scale}x{height * scale} pixels{through} needs about "
            f"{memory.readable(need)} of memory, {memory.readable(free)} are free; close other programs, "
            "split the image, or export an engine with smaller tiles"
        )

    def _engine_bytes(self) -> int:
        """What the graphs have yet to take."""
        loaded = self._loaded()
        sizes = sorted(size for role, size in self._weights.items() if role not in loaded)
        held = sizes if self.keep_all else sizes[-2:]
        weights = HELD * sum(held) + (OPENING - HELD) * max(held, default=0)
        return int(weights) + (0 if self.warm else self._work)


def image_bytes(manifest: Manifest, height: int, width: int) -> int:
    """Estimate of the memory that an image takes beside the graphs."""
    return _BYTES_PER_PIXEL * math.prod(frame_of(manifest, height, width).canvas)


def _weight_bytes(manifest: Manifest, directory: Path, role: str, target: str) -> int:
    """Weights of a graph as a session holds them: in float32, unless the graph computes in less."""
    graph = manifest.graphs[role]
    arrangement = graph.arrangement(target)
    size = sum((directory / file.file).stat().st_size for file in arrangement.files)
    return max(size, 4 * graph.params) if arrangement.precision == "fp32" else size


def _activation_bytes(manifest: Manifest, role: str, batch: int) -> int:
    """Estimate of the working memory of a graph, for `batch` tiles.

    A network that spends M multiply-accumulates a pixel is about sqrt(M) channels wide, however these are
    spread over its levels; that many float32 values a pixel is near the peak of the published networks.
    """
    graph = manifest.graphs[role]
    return int(batch * 4 * math.sqrt(graph.macs * graph.pixels()))
