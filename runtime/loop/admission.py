"""Admission of images to memory: an estimate before any work, and a reservation for each image in flight."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moesr.runtime.errors import MemoryLimitError
from moesr.runtime.loop.graph_memory import HOST, GraphMemory, MemoryPool
from moesr.runtime.loop.passes import prompt_gains
from moesr.runtime.loop.residency import Residency
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.system import memory


@dataclass(eq=False)
class Reservation:
    """Memory that is reserved for an image until it is released."""

    counts: tuple[int, ...]  # bytes of each pool
    stands: bool = True

    def release(self) -> None:
        """Release the memory; any thread may do so, more than once."""
        self.stands = False


class Admission:
    """Decides whether one more image fits into memory. It must be called under one lock.

    `warm` must be set once the graphs have allocated their working memory.
    """

    def __init__(self, graphs: GraphMemory, residency: Residency) -> None:
        self._graphs, self._residency = graphs, residency
        self.warm = False
        self._reservations: list[Reservation] = []

    def reserve(self, layout: TileLayout, settings: Settings | None = None) -> Reservation | None:
        """Reserve memory for an image; None if it has to wait for those in flight.

        `settings` say whether features are reused. Raises MemoryLimitError if the image would not fit with
        nothing else in flight.
        """
        self._reservations = [r for r in self._reservations if r.stands]
        main, *beside = (image_bytes(layout, pool) for pool in self._graphs.pools)
        counts = main + feature_bytes(layout, settings), *beside
        waits = False
        for at, pool in enumerate(self._graphs.pools):
            need = counts[at] + self._graphs.needed(pool, self._residency.loaded, warm=self.warm)
            free = self._graphs.free_bytes(pool)
            taken = sum(r.counts[at] for r in self._reservations)
            if free is None or need + taken <= free:
                continue
            if not taken:
                raise _refusal(layout, pool, need, free)
            waits = True
        if waits:
            return None
        self._reservations.append(Reservation(counts))
        return self._reservations[-1]


def image_bytes(layout: TileLayout, pool: MemoryPool = HOST) -> int:
    """Return an estimate of the memory that an image needs besides that of the graphs."""
    return pool.pixel_bytes * math.prod(layout.frame.canvas)


def feature_bytes(layout: TileLayout, settings: Settings | None) -> int:
    """Return the bytes of the deep features, which are stored per tile and prompt if steps reuse them."""
    deep = layout.manifest.deep if settings and settings.reuse > 1 else None
    if not (deep and settings):
        return 0
    return 4 * len(layout.sampling) * len(prompt_gains(settings.guidance)) * math.prod(deep.shape(1))


def _refusal(layout: TileLayout, pool: MemoryPool, need: int, free: int) -> MemoryLimitError:
    (height, width), (rows, columns) = layout.result, layout.frame.image
    through = "" if (rows, columns) == (height, width) else f", through {columns}x{rows},"
    return MemoryLimitError(
        f"{layout.width}x{layout.height} to {width}x{height} pixels{through} needs about "
        f"{memory.readable(need)} of {pool.name}, {memory.readable(free)} are free; close other "
        "programs, split the image, or export an engine with smaller tiles"
    )
