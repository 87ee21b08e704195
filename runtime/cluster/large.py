"""Named images that are too large for one worker: all workers share the tiles of one image at a time."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from moesr.runtime.cluster.dataset import Resources
from moesr.runtime.cluster.listing import Row, Sources
from moesr.runtime.cluster.places import place_of
from moesr.runtime.cluster.remote import RemoteUpscaler
from moesr.runtime.cluster.tile_pool import TilePool
from moesr.runtime.cluster.worker import Work, Worker
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import MoesrError, UsageError
from moesr.runtime.images import formats
from moesr.runtime.loop.admission import image_bytes
from moesr.runtime.loop.tile_layout import TileLayout


def split(sources: Sources, manifest: Manifest, resources: Resources) -> tuple[list[Row], Sources]:
    """Return the named images that need more memory than a worker has, and the sources without them."""
    rows = {name: sources.named(name) for name in sources.names}
    if list(rows.values()).count(None) > 1:
        raise UsageError(
            "several folders may have files of the same name, whose results would be one file; "
            "run them one by one, each with -o of its own"
        )
    large = {
        name: row for name, row in rows.items() if row and bytes_of(row, manifest) > resources.memory_bytes
    }
    others = tuple(name for name in sources.names if name not in large)
    return list(large.values()), dataclasses.replace(sources, names=others)


def bytes_of(row: Row, manifest: Manifest) -> int:
    """Return the memory that an image needs; 0 if it cannot be read, which a worker will report."""
    try:
        with tempfile.TemporaryDirectory(prefix="moesr-") as folder:
            width, height = size_of(place_of(row.source).fetch(row.key, Path(folder))[0])
        return image_bytes(TileLayout(manifest, height, width)) if width and height else 0
    except MoesrError:
        return 0


def size_of(path: Path) -> tuple[int, int]:
    """Return the width and height in the header of an image; 0 x 0 if it has none."""
    try:
        with path.open("rb") as stream, warnings.catch_warnings(action="ignore"):
            known = formats.readable(stream.read(32))
            stream.seek(0)
            with Image.open(stream, formats=known) as image:
                return image.size
    except Exception:  # decoders raise errors of any kind
        return 0, 0


def report_rows(rows: Sequence[Row], work: Work, resources: Resources) -> Iterator[dict[str, Any]]:
    """Yield the report rows of large images. All workers of the cluster process one image at a time."""
    if not rows:
        return
    import ray

    fit = int(ray.cluster_resources().get("CPU", 1) // max(resources.cpus, 1e-3))
    options = {name: work.upscaler[name] for name in ("backend", "threads", "precision", "verify")}
    reserved = {"num_cpus": resources.cpus, "memory": resources.memory_bytes}
    options["name"], options["device"] = options.pop("backend"), "cpu"
    pool = TilePool(work.engine, options, resources.workers or max(fit, 1), reserved)
    with RemoteUpscaler(work.engine, pool) as upscaler:
        worker = Worker(work, upscaler=upscaler)
        for row in rows:
            yield worker(row.values())
