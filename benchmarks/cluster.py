"""Measure the costs of a run on a cluster besides the images, and simulate 1 to 1,000 workers with them.

  python benchmarks/cluster.py --tiles ENGINE -o benchmarks/results/cluster.md

A cluster of one node is started on this machine. `--tiles` also runs an expert of an engine on one and
on two workers of one core each. The curves come from the simulation in cluster_suite/simulation.py, in which
only the lifetime of a worker is assumed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import benchlib.missing_extra  # noqa: F401
from benchlib.origin import origin_line
from cluster_suite import costs
from cluster_suite.simulation import Costs, images_per_s

WORKERS = (1, 10, 100, 300, 1000)
IMAGE_S = (1.0, 10.0, 60.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, simulate and write the page."""
    args = parser().parse_args(argv)
    text = page(args)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 0


def page(args: argparse.Namespace) -> str:
    """Return the page of results."""
    listing = costs.keys_per_s(args.keys)
    with costs.cluster(2):
        rate, driver = costs.row_costs(args.rows, 2)
        restart = costs.restart_s("demo-x4")
        tiles = costs.tiles(args.tiles, args.count) if args.tiles else None
    found = Costs(listing, driver, restart)
    lines = [
        "# A run on a cluster: costs and a simulation\n",
        origin_line() + "\n",
        "| cost | measured |",
        "| --- | --- |",
        f"| listing of a bucket of {args.keys:,} keys (rclone's S3 server) | {listing:,.0f} keys/s |",
        f"| rows of workers that compute nothing, two workers on two cores | {rate:,.0f} rows/s |",
        f"| the driver's processor per row | {1e3 * driver:.2f} ms |",
        f"| death of a worker until the next one, with demo-x4 opened, works | {restart:.1f} s |",
        f"| a line of the log, with names of 60 characters | {costs.line_bytes()} bytes |",
        "",
        "Images per second in the simulation, and their share of the rate without these costs:\n",
        f"| workers | {' | '.join(f'{s:g} s per image' for s in IMAGE_S)} |",
        f"| --- |{' --- |' * len(IMAGE_S)}",
    ]
    for workers in WORKERS:
        rates = [images_per_s(workers, s, found, args.rounds) for s in IMAGE_S]
        cells = [f"{r:,.2f} ({r * s / workers:.0%})" for r, s in zip(rates, IMAGE_S, strict=True)]
        lines.append(f"| {workers:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(_tile_lines(args, *tiles) if tiles else []), ""])


def _tile_lines(args: argparse.Namespace, found: list[costs.Tiles], equal: bool) -> list[str]:
    """Return the section about one image on many workers."""
    same = "equal to the bit" if equal else "DIFFERENT"
    return [
        "",
        f"One step on {args.count} tiles of one image, engine `{Path(args.tiles).name}`; the results of one "
        f"and two workers are {same}:\n",
        "| workers of one core | seconds | speed-up | runs of a graph | bytes per run |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {t.workers} | {t.seconds:.1f} | {found[0].seconds / t.seconds:.2f} | {t.runs} | "
            f"{t.bytes / t.runs:,.0f} |"
            for t in found
        ),
    ]


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--keys", type=int, default=20_000, help="keys of the listing (default: %(default)s)")
    add("--rows", type=int, default=1000, help="rows through the driver (default: %(default)s)")
    add("--rounds", type=int, default=40, help="images per worker in the simulation (default: %(default)s)")
    add("--tiles", metavar="ENGINE", help="run an expert of this engine on one and two workers")
    add("--count", type=int, default=12, help="tiles of that run (default: %(default)s)")
    add("-o", "--output", type=Path, metavar="FILE", help="page of results")
    return p


if __name__ == "__main__":
    sys.exit(main())
