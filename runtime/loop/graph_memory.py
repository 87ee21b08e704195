"""Estimates of the memory that an engine's graphs need, and whether all of them may stay in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.loop.cost_model import macs_of
from moesr.runtime.system import memory


@dataclass(frozen=True)
class MemoryPool:
    """A memory that graphs and images use, with the factors that estimate how much.

    An open graph takes `held` times the bytes of its weights, and `opening` times while it is being opened.
    An image that is held whole takes `pixel_bytes` per pixel of its canvas.
    """

    name: str
    held: float
    opening: float
    pixel_bytes: int


HOST = MemoryPool("memory", 2.0, 3.5, 40)
"""A CPU that runs graphs and keeps transformed kernels, measured on full-width networks with ONNX Runtime.

Each pixel counts in the resized LR image, the decoded sums, their weights, one color plane, the result and
the latents.
"""

WIDE, WIDE_BYTES = MemoryPool("memory", 1.5, 2.25, 40), 1 << 30
"""A CPU, for a graph with more than WIDE_BYTES of weights: few of its kernels are kept in transformed form.

StableSR's expert was measured at 1.35 and 2.0 with ONNX Runtime.
"""

SMALL = 1 << 30
"""Graphs that together need at most this many bytes stay in memory even if they open at once."""

BESIDE_GPU = MemoryPool("memory", 0.0, 1.0, 40)
"""The host beside a GPU that runs the graphs; it only reads their files."""

GPU = MemoryPool("memory of the GPU", 1.25, 1.5, 24)
"""Estimated, not measured.

Each pixel counts in the 16-bit LR image, the decoded sums, their weights and the latents.
"""


class GraphMemory:
    """The memory of an engine's graphs on the pools where they run.

    `pools` are the pools that graphs and images use, starting with that of the graphs. `keep_all` says
    whether all graphs may stay in memory.
    """

    def __init__(
        self,
        manifest: Manifest,
        directory: Path,
        target: str,
        max_batch: int,
        *,
        shared: bool = True,
        at_once: bool = False,
        gpu_bytes: Callable[[], int] | None = None,
    ) -> None:
        """Estimate the memory of all graphs.

        If `shared`, all graphs use one working memory. If `at_once`, graphs open so fast that large ones need
        not stay in memory. `gpu_bytes` returns the free memory of the GPU that runs the graphs; it is None if
        the CPU runs them.
        """
        self.weights = {r: _weight_bytes(manifest, directory, r, target) for r in manifest.graphs}
        self._gpu_bytes = gpu_bytes
        self.pools = (GPU, BESIDE_GPU) if gpu_bytes else (HOST,)
        main = self.pools[0]
        free = self.free_bytes(main)
        held = sum(pool_of(size, main).held * size for size in self.weights.values())
        self.keep_all = (free is None or held <= free // 2) and (held <= SMALL or not at_once)
        self.max_batch, self._shared = max_batch, shared
        self._work_per_tile = sorted(_activation_bytes(manifest, role) for role in manifest.graphs)

    def work_of(self, batch: int) -> int:
        """Return the bytes of the graphs' working memory for runs of `batch` tiles."""
        if self._shared:
            return batch * self._work_per_tile[-1]
        return batch * sum(self._work_per_tile if self.keep_all else self._work_per_tile[-2:])

    def batches(self) -> Iterator[int]:
        """Yield numbers of tiles per run, from the present one down to 1."""
        batch = self.max_batch
        while batch:
            yield batch
            batch //= 2

    def free_bytes(self, pool: MemoryPool) -> int | None:
        """Return the free bytes of a pool; None if they are unknown."""
        return self._gpu_bytes() if pool is GPU and self._gpu_bytes else memory.available_bytes()

    def needed(
        self, pool: MemoryPool, loaded: frozenset[str], *, warm: bool, batch: int | None = None
    ) -> int:
        """Return the bytes of a pool that the graphs still have to allocate, for runs of `batch` tiles.

        `loaded` are the roles in memory; `warm` says that the working memory is allocated already.
        """
        sizes = sorted(size for role, size in self.weights.items() if role not in loaded)
        coming = [(pool_of(size, pool), size) for size in (sizes if self.keep_all else sizes[-2:])]
        weights = sum(p.held * size for p, size in coming)
        weights += max(((p.opening - p.held) * size for p, size in coming), default=0)
        working = pool is self.pools[0] and not warm
        return int(weights) + (self.work_of(batch or self.max_batch) if working else 0)


def pool_of(size: int, pool: MemoryPool) -> MemoryPool:
    """Return the factors that apply to a graph with `size` bytes of weights."""
    return WIDE if pool is HOST and size > WIDE_BYTES else pool


def _weight_bytes(manifest: Manifest, directory: Path, role: str, target: str) -> int:
    """Return the bytes of a graph's weights in a session: float32 unless the graph has lower precision."""
    graph = manifest.graphs[role]
    arrangement = graph.arrangement(target)
    size = sum((directory / file.file).stat().st_size for file in arrangement.files)
    sharing = [g for g in manifest.graphs.values() if {*g.arrangement(target).data} & {*arrangement.data}]
    if most := max((g.params for g in sharing), default=0):
        size = size * graph.params // most
    return max(size, 4 * graph.params) if arrangement.precision in ("fp32", "bf16") else size


def _activation_bytes(manifest: Manifest, role: str) -> int:
    """Return an estimate of the working memory of a graph for one tile.

    A network that needs M multiply-accumulates per pixel is about sqrt(M) channels wide, however these are
    spread over its levels. That many float32 values per pixel is near the peak of the published networks.
    """
    graph = manifest.graphs[role]
    return int(4 * math.sqrt(macs_of(role, graph) * graph.pixels()))
