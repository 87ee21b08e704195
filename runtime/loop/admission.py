"""Memory for images: an estimate before any work, and room kept for all that are in flight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import MemoryLimitError
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.passes import prompt_gains
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import frame_of, sampling_grid
from moesr.runtime.system import memory


@dataclass(frozen=True)
class MemoryPool:
    """A memory that graphs and images take, and how much: `held` and `opening` over a graph's weights.

    `pixel_bytes` is for each pixel of output: canvases and results.
    """

    name: str
    held: float  # once open
    opening: float  # while it opens
    pixel_bytes: int


HOST = MemoryPool("memory", 2.0, 3.5, 40)
"""A CPU that runs graphs: kernels are kept transformed. Measured on full-width networks with ONNX Runtime.

A pixel: LR image resized, decoded sums, weights, one color plane, result, latents.
"""

WIDE, WIDE_BYTES = MemoryPool("memory", 1.5, 2.25, 40), 1 << 30
"""A CPU, for a graph of more weights than that: few of its kernels are kept transformed.

StableSR's expert was measured at 1.35 and 2.0 with ONNX Runtime.
"""

SMALL = 1 << 30
"""Bytes of graphs that are kept in memory even where they would open at once."""

BESIDE_GPU = MemoryPool("memory", 0.0, 1.0, 40)
"""The host where a GPU runs the graphs: it reads their files."""

GPU = MemoryPool("memory of the GPU", 1.25, 1.5, 24)
"""Reckoned, not measured. A pixel: LR image of 16 bits, decoded sums, their weights, latents."""


@dataclass(eq=False)
class Reservation:
    """Memory that an image may take; it stands until the image's job is done, or is let go."""

    counts: tuple[int, ...]  # bytes, of each place
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
        at_once: bool = False,
        gpu_bytes: Callable[[], int] | None = None,
    ) -> None:
        """`loaded` tells the roles of the graphs in memory; `shared`: their working memory is one.

        `at_once`: graphs open so fast that large ones need not be kept until they are used again.
        `gpu_bytes` tells how much memory is free on the GPU that runs them; None where the CPU does.
        """
        self._manifest, self._loaded = manifest, loaded
        self._weights = {r: _weight_bytes(manifest, directory, r, target) for r in manifest.graphs}
        self._gpu_bytes = gpu_bytes
        self._places = (GPU, BESIDE_GPU) if gpu_bytes else (HOST,)
        main = self._places[0]
        work = sorted(_activation_bytes(manifest, r, max_batch) for r in manifest.graphs)
        free = self._free_bytes(main)
        held = sum(place_of(size, main).held * size for size in self._weights.values())
        self.keep_all = (free is None or held <= free // 2) and (held <= SMALL or not at_once)
        self._work = work[-1] if shared else sum(work if self.keep_all else work[-2:])
        self.warm = False  # whether the graphs have taken their working memory
        self._reservations: list[Reservation] = []

    def reserve(self, height: int, width: int, settings: Settings | None = None) -> Reservation | None:
        """Room for an image of `height` x `width` LR pixels; None where it has to wait for those in flight.

        `settings` say whether features are reused. Raises MemoryLimitError where the image would not fit with
        nothing else in flight.
        """
        self._reservations = [r for r in self._reservations if r.stands]
        main, *beside = (image_bytes(self._manifest, height, width, place) for place in self._places)
        counts = main + feature_bytes(self._manifest, height, width, settings), *beside
        waits = False
        for at, place in enumerate(self._places):
            need, free = counts[at] + self._engine_bytes(place), self._free_bytes(place)
            taken = sum(r.counts[at] for r in self._reservations)
            if free is None or need + taken <= free:
                continue
            if not taken:
                raise self._refusal(place, height, width, need, free)
            waits = True
        if waits:
            return None
        self._reservations.append(Reservation(counts))
        return self._reservations[-1]

    def _free_bytes(self, place: MemoryPool) -> int | None:
        return self._gpu_bytes() if place is GPU and self._gpu_bytes else memory.available_bytes()

    def _refusal(self, place: MemoryPool, height: int, width: int, need: int, free: int) -> MemoryLimitError:
        scale = self._manifest.scale
        rows, columns = frame_of(self._manifest, height, width).image
        through = "" if rows == height * scale else f", through {columns}x{rows},"
        return MemoryLimitError(
            f"{width}x{height} to {width * scale}x{height * scale} pixels{through} needs about "
            f"{memory.readable(need)} of {place.name}, {memory.readable(free)} are free; close other "
            "programs, split the image, or export an engine with smaller tiles"
        )

    def _engine_bytes(self, place: MemoryPool) -> int:
        """What the graphs have yet to take of a place."""
        loaded = self._loaded()
        sizes = sorted(size for role, size in self._weights.items() if role not in loaded)
        taken = [(place_of(size, place), size) for size in (sizes if self.keep_all else sizes[-2:])]
        weights = sum(p.held * size for p, size in taken)
        weights += max(((p.opening - p.held) * size for p, size in taken), default=0)
        working = place is self._places[0] and not self.warm
        return int(weights) + (self._work if working else 0)


def place_of(size: int, place: MemoryPool) -> MemoryPool:
    """How much memory a graph with weights of `size` bytes takes of a place."""
    return WIDE if place is HOST and size > WIDE_BYTES else place


def image_bytes(manifest: Manifest, height: int, width: int, place: MemoryPool = HOST) -> int:
    """Estimate of the memory that an image takes beside the graphs."""
    return place.pixel_bytes * math.prod(frame_of(manifest, height, width).canvas)


def feature_bytes(manifest: Manifest, height: int, width: int, settings: Settings | None) -> int:
    """The deep features that are kept of every tile, once a prompt, where steps reuse them."""
    deep = manifest.deep if settings and settings.reuse > 1 else None
    if not (deep and settings):
        return 0
    latent = frame_of(manifest, height, width).latent(manifest.latent_factor)
    tiles = len(sampling_grid(manifest, *latent)) * len(prompt_gains(settings.guidance))
    return 4 * tiles * math.prod(deep.shape(1))


def _weight_bytes(manifest: Manifest, directory: Path, role: str, target: str) -> int:
    """Weights of a graph as a session holds them: in float32, unless the graph computes in less."""
    graph = manifest.graphs[role]
    arrangement = graph.arrangement(target)
    size = sum((directory / file.file).stat().st_size for file in arrangement.files)
    sharing = [g for g in manifest.graphs.values() if {*g.arrangement(target).data} & {*arrangement.data}]
    if most := max((g.params for g in sharing), default=0):
        size = size * graph.params // most
    return max(size, 4 * graph.params) if arrangement.precision in ("fp32", "bf16") else size


def _activation_bytes(manifest: Manifest, role: str, batch: int) -> int:
    """Estimate of the working memory of a graph, for `batch` tiles.

    A network that spends M multiply-accumulates a pixel is about sqrt(M) channels wide, however these are
    spread over its levels; that many float32 values a pixel is near the peak of the published networks.
    """
    graph = manifest.graphs[role]
    return int(batch * 4 * math.sqrt(graph.macs * graph.pixels()))
