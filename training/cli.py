"""Train a MoE-SR model from photographs, one stage after the other:

  moesr-train autoencoder --config demo-x4 --data photos -o runs/autoencoder
  moesr-train experts     --config demo-x4 --data photos -o runs/experts --from runs/autoencoder/checkpoint
  moesr-train decoder     --config demo-x4 --data photos -o runs/decoder --from runs/experts/checkpoint

Every stage continues where it stopped when the same command is run again, and writes a checkpoint directory that
moesr-export and the next stage read.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from moesr.runtime.errors import MoesrError, UsageError
from moesr.training.checkpoint import load_checkpoint
from moesr.training.data import Crops, find_photographs
from moesr.training.loop import Run
from moesr.training.recipe import load_recipe, presets
from moesr.training.stages import autoencoder, decoder, experts


def parser() -> argparse.ArgumentParser:
    """Command line of moesr-train."""
    result = argparse.ArgumentParser(
        prog="moesr-train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("stage", choices=("autoencoder", "experts", "decoder"))
    result.add_argument(
        "--config", required=True, help=f"recipe: a JSON file or one of {', '.join(presets())}"
    )
    result.add_argument(
        "--data", type=Path, required=True, help="folder of photographs, searched recursively"
    )
    result.add_argument("-o", "--output", type=Path, required=True, help="directory of this stage")
    result.add_argument("--from", type=Path, dest="start", help="checkpoint directory of the stage before")
    result.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    result.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch (default)"
    )
    result.add_argument("--workers", type=int, default=0, help="data-loader processes (default: %(default)s)")
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    return result


def train(args: argparse.Namespace) -> None:
    """Run one stage."""
    recipe = load_recipe(args.config)
    if args.threads:
        torch.set_num_threads(args.threads)
    stage = getattr(recipe, args.stage)
    data = Crops(find_photographs(args.data, stage.patch_px), stage.patch_px, recipe.seed)
    run = Run(args.output, recipe.seed, torch.device(args.device), args.workers, args.quiet)
    if args.stage == "autoencoder":
        return autoencoder.train(recipe, data, run)
    if args.start is None:
        before = {"experts": "autoencoder", "decoder": "experts"}[args.stage]
        raise UsageError(
            f"{args.stage} builds on the stage before: give --from with the checkpoint of {before}"
        )
    checkpoint = load_checkpoint(args.start)
    return (experts if args.stage == "experts" else decoder).train(recipe, data, run, checkpoint)


def main() -> None:
    """Entry point: exit codes 0 done, 1 bad data or checkpoint, 2 usage, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser().parse_args()
    try:
        train(args)
    except MoesrError as error:
        print(f"moesr-train: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
