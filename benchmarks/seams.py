"""Measure the seams between tiles, and the time, of both tilings: the wide overlap and the shifted grid.

The seam measure compares the gradient across the borders of tiles with the gradient elsewhere. For every line
between two rows or columns of pixels, the gradient is the mean absolute difference across it. The value of a
border is the largest gradient within a pixel of it, divided by the median of the same value at lines nearby
that are no borders and have the same place within a latent pixel. 1 means that no seam can be found; an image
that was cut there and shifted in brightness has far more. The measure across the wrap of a tileable result is
that of its opposite sides.

The images are flat, noisy and natural. Engines and tilings take turns in one process, and times are medians.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import benchlib.missing_extra  # noqa: F401
import numpy as np
from benchlib.image_pairs import load_originals
from benchlib.origin import origin_line
from benchlib.program import print_page
from benchlib.tables import grid

from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.loop.settings import resolve
from moesr.runtime.loop.tile_layout import TILINGS, Grid, TileLayout
from moesr.runtime.upscaler import Upscaler

FLOOR = 1e-5
"""Gradient, of a range of 1, that is added to both sides of the comparison: 0.0026 levels of 8 bits."""

REACH = 4
"""Latent pixels on either side of a border from which the other lines come."""

TIMED = "natural"
"""The image that is run in several rounds, whose median time is reported."""

MEGAPIXELS = (0.25, 1, 4, 16, 100)
RESULT_PX = 800
"""Side of the results that are measured: the widest for which both tilings are run in seconds."""


def gradients(image: np.ndarray, axis: int) -> np.ndarray:
    """Mean absolute difference across each line between pixels along an axis of [H, W, C], range 0 to 1.

    Element i is between pixels i and i + 1; the last one is between the last and the first pixel.
    """
    values = image.astype(np.float64) / (np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1.0)
    rolled = np.roll(values, -1, axis)
    return np.abs(rolled - values).mean(axis=(1 - axis, 2))


def seam(image: np.ndarray, axis: int, borders: Iterable[int], period: int = 4) -> list[float]:
    """The measure of each border: a position b is between pixels b - 1 and b; 0 is across the wrap.

    `period` is the number of pixels per latent pixel, at whose multiples all lines are alike.
    """
    lines = gradients(image, axis)
    size, marks = len(lines), sorted(set(borders))
    peaks = np.maximum(np.maximum(np.roll(lines, 1), lines), np.roll(lines, -1)) + FLOOR
    found = []
    for b in marks:
        near = [b + k * period for k in range(-REACH, REACH + 1) if abs(k) > 1]
        others = [p for p in near if 1 < p < size - 1 and all(abs(p - m) > period for m in marks)]
        if others:
            found.append(float(peaks[b - 1] / np.median([peaks[p - 1] for p in others])))
    return found


def borders(tiles: Grid, layout: TileLayout, axis: int) -> set[int]:
    """Positions in output pixels of the edges of tiles, and of the middles of their overlaps."""
    tile, factor, size = layout.manifest.latent_tile, layout.manifest.latent_factor, layout.latent[axis]
    starts = sorted({place[axis] for place in tiles})
    edges = {edge for start in starts for edge in (start, start + tile) if 0 < edge < size}
    middles = {(first + tile + second) / 2 for first, second in itertools.pairwise(starts)}
    return {int(place * factor) for place in edges | middles}


def measure(image: np.ndarray, tiles: Grid, layout: TileLayout) -> float:
    """The mean measure of all borders of a grid, down and across; 1 for a single tile."""
    period = layout.manifest.latent_factor
    values = [v for axis in (0, 1) for v in seam(image, axis, borders(tiles, layout, axis), period)]
    return statistics.fmean(values) if values else 1.0


def across_the_wrap(image: np.ndarray, period: int = 4) -> float:
    """The measure between opposite sides, the larger one of both directions."""
    half = image.shape[0] // 2 // period * period, image.shape[1] // 2 // period * period
    rolled = np.roll(image, half, axis=(0, 1))
    return max(seam(rolled, axis, [half[axis]], period)[0] for axis in (0, 1))


def pictures(side: int) -> dict[str, np.ndarray]:
    """The inputs by kind, uint16 [side, side, 3]: results in 16 bits show differences below a level of 8."""
    rng = np.random.default_rng(0)
    noisy = np.clip(0.5 + 0.04 * rng.standard_normal((side, side, 3)), 0, 1) * 65535
    photograph = next(iter(load_originals("demo").values()))
    natural = photograph[60 : 60 + side, 100 : 100 + side].astype(np.uint16) * 257
    return {
        "flat": np.full((side, side, 3), 38000, np.uint16),
        "noisy": noisy.astype(np.uint16),
        "natural": natural,
    }


def rows_of(up: Upscaler, name: str, steps: int, rounds: int) -> list[list[str]]:
    """Run both tilings on every picture in turn; returns the rows of the table."""
    seconds: dict[tuple[str, str], list[float]] = {}
    results: dict[tuple[str, str], np.ndarray] = {}
    images = pictures(RESULT_PX // up.manifest.scale)
    up(images["flat"], steps=steps)  # graphs are loaded
    for kind, image in images.items():
        for _ in range(rounds if kind == TIMED else 1):
            for tiling in TILINGS:
                start = time.perf_counter()
                results[kind, tiling] = up(image, steps=steps, tiling=tiling, color_fix="none")
                seconds.setdefault((kind, tiling), []).append(time.perf_counter() - start)
    made = []
    for (kind, tiling), result in results.items():
        settings = resolve(up.manifest, steps=steps, tiling=tiling)
        layout = settings.layout(up.manifest, *images[kind].shape[:2])
        last = layout.sampling_at(steps - 1)
        made.append(
            [
                *(name, kind, tiling, f"{len(layout.sampling)}", f"{len(layout.coding)}"),
                f"{statistics.median(seconds[kind, tiling]):.2f}" if kind == TIMED else "-",
                *(f"{measure(result, tiles, layout):.3f}" for tiles in (last, layout.coding)),
                f"{measure(result, halfway(layout), layout):.3f}",
            ]
        )
    return made


def halfway(layout: TileLayout) -> Grid:
    """A grid whose borders are no borders of the decoder's: the control of the measure."""
    move = layout.manifest.latent_tile // 2
    return [(y + move, x + move) for y, x in layout.coding]


def tile_rows(manifest: Manifest) -> list[list[str]]:
    """Numbers of tiles by the size of a square result, with the area of the tiles over that of the image."""
    made = []
    for megapixels in MEGAPIXELS:
        side = int((megapixels * 1e6) ** 0.5) // manifest.scale
        cells = [f"{megapixels:g}"]
        for tiling in TILINGS:
            layout = TileLayout(manifest, side, side, tiling)
            for tiles in (layout.sampling, layout.coding):
                area = len(tiles) * manifest.latent_tile**2 / (layout.latent[0] * layout.latent[1])
                cells.append(f"{len(tiles)} ({area:.2f})")
        made.append(cells)
    return made


def benchmark(args: argparse.Namespace) -> str:
    """Measure every engine and write the page; returns it."""
    rows, counts = [], []
    for engine in args.engines:
        with Upscaler(engine, backend=args.backend, threads=args.threads) as up:
            rows += rows_of(up, engine, args.steps, args.rounds)
            counts += [[engine, *cells] for cells in tile_rows(up.manifest)]
    head = ["Engine", "Image", "Tiling", "Tiles per step", "Tiles decoded", "Seconds"]
    head += ["Seam, last step", "Seam, decoder", "Elsewhere"]
    by_size = [
        "Engine",
        "Megapixels",
        *(f"{what}, {tiling}" for tiling in TILINGS for what in ("Step", "Decoder")),
    ]
    page = "\n".join(
        [
            "# Seams between tiles\n",
            origin_line() + "\n",
            f"Results of {RESULT_PX}x{RESULT_PX} pixels, {args.steps} steps, no color fix, {args.threads} "
            f"thread(s); seconds are medians of {args.rounds} rounds in which the tilings took turns. A seam "
            "of 1 cannot be found (the measure is described in `benchmarks/seams.py`).\n",
            grid(head, rows, names=3) + "\n",
            "Numbers of tiles for square results, with their area over that of the image:\n",
            grid(by_size, counts, names=1) + "\n",
        ]
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "seams.md").write_text(page, "utf-8")
    return page


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--engines", nargs="+", default=["demo-x4", "demo-x8"], metavar="DIR", help="engines")
    p.add_argument("--backend", default="auto", help="backend (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    p.add_argument("--steps", type=int, default=5, metavar="N", help="sampling steps (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    p.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results"), help="directory of seams.md")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return print_page(benchmark, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
