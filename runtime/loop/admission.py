"""Admits images to memory: an estimate before any work, and a reservation for each image in flight.

If memory is short for an image although nothing else is in flight, the number of tiles per run is lowered
first. Then the image is spooled, which decodes one row of tiles at a time and keeps everything of the size of
the result on disk. If even that does not fit, the error says what would.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from moesr.runtime.errors import MemoryLimitError
from moesr.runtime.images.color_rows import STRIP_PX
from moesr.runtime.loop.graph_memory import GPU, HOST, GraphMemory, MemoryPool
from moesr.runtime.loop.passes import prompt_gains
from moesr.runtime.loop.residency import Residency
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.spooled import SPOOL_FROM_PX, can_spool
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.system import memory

log = logging.getLogger("moesr")


ExtraBytes = Callable[[TileLayout], int]
"""Bytes of the main pool that an image of a layout takes besides `image_bytes`; see `Source.extra_bytes`."""


def no_extra(layout: TileLayout) -> int:
    """Return 0: most images take no more than `image_bytes`."""
    del layout
    return 0


TILE_STEP_PX = 64
"""Sides of tiles that are proposed are multiples of this."""


@dataclass(eq=False)
class Reservation:
    """Memory that an image may take. It stands until it is released."""

    counts: tuple[int, ...]  # bytes of each pool
    spooled: bool = False  # what has the size of the result goes to disk
    stands: bool = True

    def release(self) -> None:
        """Give the memory back; any thread may do so, more than once."""
        self.stands = False


@dataclass(frozen=True)
class Forecast:
    """The estimate of what an image takes.

    `seconds` is None if nothing was ever measured with this engine and backend. `memory_bytes`, with what the
    graphs still have to take, and `free_bytes` are of the memory where the graphs run; the latter is None if
    the system does not tell. `disk_bytes` are those of temporary files.
    """

    seconds: float | None
    memory_bytes: int
    free_bytes: int | None
    disk_bytes: int


@dataclass(frozen=True)
class Shortage:
    """A pool that an image does not fit into, with what it needs, and what others in flight have taken."""

    pool: MemoryPool
    need: int
    free: int
    taken: int


class Admission:
    """Decides whether one more image fits into memory. Call it under one lock.

    `warm` is to be set once the graphs have taken their working memory.
    """

    def __init__(
        self, graphs: GraphMemory, residency: Residency, lower: Callable[[int], None] = lambda most: None
    ) -> None:
        """`lower` is called with the number of tiles per run if it has to be lowered."""
        self._graphs, self._residency, self._lower = graphs, residency, lower
        self.warm = False
        self._reservations: list[Reservation] = []

    def reserve(
        self,
        layout: TileLayout,
        settings: Settings | None = None,
        extra: ExtraBytes = no_extra,
        *,
        spools: bool = True,
    ) -> Reservation | None:
        """Reserve memory for an image; None if it has to wait for those in flight.

        `settings` tell whether features are reused, and `extra` counts what the image takes in the main pool
        besides. An image that never `spools` is held whole. Raises MemoryLimitError if the image would not
        fit with nothing else in flight.
        """
        self._reservations = [r for r in self._reservations if r.stands]
        shortage = None
        for spooled in forms(layout) if spools else (False,):
            for batch in [self._graphs.max_batch] if self.warm else self._graphs.batches():
                counts = self.counts(layout, settings, spooled, extra)
                shortage = self._shortage(counts, batch)
                if shortage is None:
                    self._take_less(layout, batch, spooled)
                    self._reservations.append(Reservation(counts, spooled))
                    return self._reservations[-1]
                if shortage.taken:
                    return None
        assert shortage
        raise self._refusal(layout, settings, extra, shortage)

    def expected(self, layout: TileLayout, settings: Settings) -> tuple[int, int | None]:
        """Return the bytes that an image and the graphs will take in the main pool, and the free bytes."""
        pool = self._graphs.pools[0]
        count = self.counts(layout, settings, forms(layout)[0])[0]
        return count + self._needed(pool, self._graphs.max_batch), self._graphs.free_bytes(pool)

    def counts(
        self, layout: TileLayout, settings: Settings | None, spooled: bool, extra: ExtraBytes = no_extra
    ) -> tuple[int, ...]:
        """Return the bytes of each pool that an image takes."""
        main, *beside = (
            spooled_bytes(layout) if spooled and pool is not GPU else image_bytes(layout, pool)
            for pool in self._graphs.pools
        )
        return main + feature_bytes(layout, settings) + extra(layout), *beside

    def _needed(self, pool: MemoryPool, batch: int) -> int:
        return self._graphs.needed(pool, self._residency.loaded, warm=self.warm, batch=batch)

    def _shortage(self, counts: tuple[int, ...], batch: int) -> Shortage | None:
        """Return the pool that lacks memory, preferably one that would lack it with nothing in flight."""
        found = []
        for at, pool in enumerate(self._graphs.pools):
            need, free = counts[at] + self._needed(pool, batch), self._graphs.free_bytes(pool)
            taken = sum(r.counts[at] for r in self._reservations)
            if free is not None and need + taken > free:
                found.append(Shortage(pool, need, free, taken))
        return min(found, key=lambda s: s.taken, default=None)

    def _take_less(self, layout: TileLayout, batch: int, spooled: bool) -> None:
        """Put a smaller number of tiles per run into effect, and log what is done for lack of memory."""
        if batch < self._graphs.max_batch:
            log.info("memory is short: %d tiles per run instead of %d", batch, self._graphs.max_batch)
            self._graphs.max_batch = batch
            self._lower(batch)
        if spooled and not forms(layout)[0]:
            log.info("memory is short: decoded rows go to temporary files, one row of tiles at a time")

    def _refusal(
        self, layout: TileLayout, settings: Settings | None, extra: ExtraBytes, lack: Shortage
    ) -> MemoryLimitError:
        (height, width), (rows, columns) = layout.result, layout.frame.image
        through = "" if (rows, columns) == (height, width) else f", through {columns}x{rows},"
        fits = self._largest(layout, settings, extra)
        if fits:
            would = f"{fits.width}x{fits.height} pixels would fit: close other programs, or split the image"
        else:
            tile = self._smaller_tile(layout)
            other = (
                f", or use an engine with tiles of {tile} pixels (moesr-export --tile {tile})" if tile else ""
            )
            side = layout.manifest.tile
            would = f"not even one tile of {side} pixels fits beside the engine: close other programs{other}"
        return MemoryLimitError(
            f"{layout.width}x{layout.height} to {width}x{height} pixels{through} needs about "
            f"{memory.readable(lack.need)} of {lack.pool.name}, {memory.readable(lack.free)} are free; "
            f"{would}"
        )

    def _smaller_tile(self, layout: TileLayout) -> int:
        """Return the side of a tile, in output pixels, with which an engine would fit now; 0 if none would.

        Working memory is proportional to the area of a tile; an image of one tile is counted beside it.
        """
        pool, side, work = self._graphs.pools[0], layout.manifest.tile, self._graphs.work_of(1)
        free = self._graphs.free_bytes(pool)
        weights = self._needed(pool, 1) - (0 if self.warm else work)
        if free is None or free <= weights:
            return 0
        per_tile = work + pool.pixel_bytes * side * side
        fitting = int(side * math.sqrt((free - weights) / per_tile)) // TILE_STEP_PX * TILE_STEP_PX
        return fitting if fitting < side else 0

    def _largest(self, layout: TileLayout, settings: Settings | None, extra: ExtraBytes) -> TileLayout | None:
        """Return the layout of the largest image of these proportions that would fit now."""
        fits, low, high = None, 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            sides = [max(int(middle * side), 1) for side in (layout.height, layout.width)]
            tried = replace(layout, height=sides[0], width=sides[1])
            batch = self._graphs.max_batch if self.warm else 1
            if self._shortage(self.counts(tried, settings, forms(tried)[-1], extra), batch):
                high = middle
            else:
                fits, low = tried, middle
        return fits


def forms(layout: TileLayout) -> tuple[bool, ...]:
    """Return whether an image is spooled: by default, and if memory is short."""
    if not can_spool(layout):
        return (False,)
    return (True,) if math.prod(layout.frame.canvas) >= SPOOL_FROM_PX else (False, True)


def image_bytes(layout: TileLayout, pool: MemoryPool = HOST) -> int:
    """Return an estimate of the memory that an image takes beside the graphs if it is held whole."""
    return pool.pixel_bytes * math.prod(layout.frame.canvas)


def spooled_bytes(layout: TileLayout) -> int:
    """Return an estimate of the host memory that an image takes beside the graphs if it is spooled.

    The latents are freed before the color correction. A result of 100 megapixels was measured at 0.87 GB with
    the graphs of demo-x4 and the program itself, where this gives 0.68 GB without them.
    """
    m, (rows, columns) = layout.manifest, layout.frame.canvas
    planes = 3 + 2 * (m.condition == "latent")  # latent, mean, history; mean and noise of the encoder
    latents = math.prod(layout.latent) * (4 * m.latent_channels * planes + 8)
    source = 24 * layout.height * layout.width  # the input, its padded copy and the condition, in 16 bits
    band = 24 * m.tile * columns  # decoded sums, their weights, and one plane while it moves
    strips = 72 * min(max(STRIP_PX, 68 * columns), rows * columns)
    cells = 9 * rows * columns // 2  # of three channels, while flat regions are found
    return source + max(latents + band, strips + cells)


def feature_bytes(layout: TileLayout, settings: Settings | None) -> int:
    """Return the bytes of the deep features that are kept per tile and prompt if steps reuse them."""
    deep = layout.manifest.deep if settings and settings.reuse > 1 else None
    if not (deep and settings):
        return 0
    return 4 * len(layout.sampling) * len(prompt_gains(settings.guidance)) * math.prod(deep.shape(1))
