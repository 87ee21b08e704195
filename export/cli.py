"""Export a checkpoint as an engine directory for moesr-run.

Every graph is compared with its PyTorch network before anything is published; the manifest holds the measured
error. Without CHECKPOINT the x4 demo checkpoint that comes with moesr is exported; demo-x8 names the x8 one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesr.runtime import console

if TYPE_CHECKING:
    from moesr.runtime.manifest import Manifest

MEGA = 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moesr-export` and return its exit code.

    0 done, 1 a checkpoint that cannot be read or an engine that cannot be written, 2 usage, 3 no parity,
    4 out of memory, 128 and a signal's number where that ended it.
    """
    return console.run_program(
        "moesr-export",
        parser,
        _export,
        argv,
        interrupted="nothing was written",
        out_of_memory="close other programs, or take a smaller --tile",
    )


def _export(args: argparse.Namespace) -> int:
    from moesr.export import package  # --help does not wait for torch
    from moesr.training.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(package.checkpoint_directory(args.checkpoint))
    precision = "fp16" if args.fp16 else "fp32"
    own = next(iter(package.lowerings(args.target, precision, args.store).values()))
    directory = args.output or Path(f"{checkpoint.config.name}-{own.precision}")
    done = itertools.count()
    stages = package.stage_count(checkpoint.config, args.target)
    with console.bar(args.quiet, total=stages, unit="stage") as bar:

        def on_stage(stage: str) -> None:
            bar.n = next(done)
            bar.set_description(stage)

        manifest = package.export_engine(
            checkpoint,
            directory,
            target=args.target,
            precision=precision,
            store=args.store,
            tile_px=args.tile,
            force=args.force,
            on_stage=on_stage,
        )
        bar.n = stages
        bar.refresh()
    if not args.quiet:
        console.say(f"wrote {directory} ({_summary(manifest, directory)})")
    return 0


def _summary(manifest: Manifest, directory: Path) -> str:
    arrangements = [a for graph in manifest.graphs.values() for a in graph.arrangements]
    proofs = [a.parity.relative_l2 for a in arrangements if a.parity]
    precisions = dict.fromkeys(a.precision for a in arrangements)
    size = sum((directory / file.file).stat().st_size for file in manifest.files)
    return (
        f"{manifest.name}, {' and '.join(precisions)}, tile {manifest.tile} px, "
        f"{len(manifest.experts)} experts, {size / MEGA:.1f} MB; "
        f"largest error {max(proofs):.1e} against the network"
    )


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser("moesr-export", description=__doc__, formatter_class=console.HelpFormatter)
    add = p.add_argument
    add(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="checkpoint directory, or demo-x4 (default) or demo-x8",
    )
    add(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="engine directory to write (default: ./NAME-PRECISION)",
    )
    add(
        "--target",
        choices=["cpu", "gpu", "both"],
        default="cpu",
        help="what the graphs are arranged for, though all run on either; with both the engine holds a "
        "second file of each graph (default: cpu)",
    )
    add(
        "--fp16",
        action="store_true",
        help="half precision weights and arithmetic, float32 where the model needs it; with --target both "
        "for the GPU's graphs alone (default: float32)",
    )
    add(
        "--store",
        choices=["fp32", "fp16"],
        default="fp32",
        help="how files hold the weights of float32 graphs: fp16 halves their size, and opening the engine "
        "casts them back (default: fp32)",
    )
    add("--tile", type=int, default=512, metavar="PX", help="side of a tile in output pixels (default: 512)")
    add("--force", action="store_true", help="replace an existing engine directory")
    add("--quiet", action="store_true", help="no bar and no report, only errors")
    add("--debug", action="store_true", help="show where an internal error comes from")
    return p


if __name__ == "__main__":
    sys.exit(main())
