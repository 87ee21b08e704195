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

from tqdm import tqdm

from moesr.runtime.errors import MemoryLimitError, MoesrError

OUT_OF_MEMORY = "out of memory; close other programs, or take a smaller --tile"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moesr-export` and return its exit code.

    0 done, 1 a checkpoint that cannot be read or an engine that cannot be written, 2 usage, 3 no parity,
    4 out of memory.
    """
    args = parser().parse_args(argv)
    try:
        return _export(args)
    except MoesrError as error:
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail(OUT_OF_MEMORY, MemoryLimitError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted, nothing was written", 130)
    except Exception as error:
        if "alloc" in str(error).lower():  # the libraries have no exception of their own for it
            return _fail(OUT_OF_MEMORY, MemoryLimitError.exit_code)
        return _fail(f"internal error, please report it: {type(error).__name__}: {error}", 1)


def _export(args: argparse.Namespace) -> int:
    from moesr.export import package  # --help does not wait for torch
    from moesr.training.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(package.checkpoint_directory(args.checkpoint))
    precision = "fp16" if args.fp16 else "fp32"
    directory = args.output or Path(f"{checkpoint.config.name}-{precision}")
    done = itertools.count()
    with tqdm(
        total=package.stage_count(checkpoint.config), unit="stage", file=sys.stderr, disable=None
    ) as bar:

        def on_stage(stage: str) -> None:
            bar.n = next(done)
            bar.set_description(stage)

        manifest = package.export_engine(
            checkpoint, directory, precision=precision, tile_px=args.tile, force=args.force, on_stage=on_stage
        )
        bar.update()
    worst = max(proof.relative_l2 for proof in manifest.parity.values())
    print(
        f"wrote {directory} ({manifest.name}, {precision}, tile {manifest.tile} px, "
        f"{len(manifest.experts)} experts; largest error {worst:.1e} against the network)"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(
        "moesr-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        "--fp16",
        action="store_true",
        help="half precision weights and arithmetic, float32 where the model needs it (default: float32)",
    )
    add("--tile", type=int, default=512, metavar="PX", help="side of a tile in output pixels (default: 512)")
    add("--force", action="store_true", help="replace an existing engine directory")
    return p


def _fail(message: str, code: int) -> int:
    print(f"moesr-export: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
