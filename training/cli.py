"""Train MoE-SR or StableSR from photographs, all stages with one command or one stage at a time:

  moesr-train all         --config demo-x4 --data photos -o model

  moesr-train autoencoder --config demo-x4 --data photos -o vq
  moesr-train experts     --config demo-x4 --data photos -o experts --from vq/checkpoint
  moesr-train latents     --config demo-x4 --data photos -o latents --from experts/checkpoint
  moesr-train decoder     --config demo-x4 --latents latents -o decoder --from experts/checkpoint

  moesr-train structure   --config stablesr-stage1 --data photos -o stage1 --from sd
  moesr-train decoder     --config stablesr-stage2 --data photos -o stage2 --from stage1/checkpoint

  moesr-train refinement  --config kl-f8 --data photos -o refined --from vae

The last command trains the refinement network alone, for the frozen autoencoder of Stable Diffusion that
moesr-import --decoder wrote to vae. The two before it train StableSR on the Stable Diffusion that
moesr-import --stable-diffusion wrote to sd. On eight GPUs, as in the papers, their total batch sizes are the
papers', and StableSR's numbers of steps correspond roughly to the epochs in its published settings.

A published autoencoder that moesr-import has read can replace the autoencoder stage: pass it with --from,
also to `all`. If the decoder stage is given photographs (--data) in place of --latents, it makes the latents
first. Every stage resumes where it stopped when the same command is run again, and writes a checkpoint
directory that moesr-export and the next stage read. To train on several GPUs:

  torchrun --nproc-per-node 8 -m moesr.training.cli experts --config x4 ...

Exit codes: 0 done, 1 bad data or checkpoint, 2 usage, 3 the loss is not finite, 4 out of memory,
130 interrupted, 143 ended by SIGTERM (the finished steps are saved).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moesr.runtime.system.console import HelpFormatter, run_program
from moesr.training.recipe import presets


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `moesr-train`; returns the exit code."""
    return run_program(
        "moesr-train",
        parser,
        run,
        argv,
        interrupted="the same command continues after the last saved step",
        out_of_memory="close other programs",
        extra="train",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command that the parsed arguments describe; returns the exit code."""
    from moesr.training import train_command

    return train_command.start(args)


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    result = argparse.ArgumentParser(prog="moesr-train", description=__doc__, formatter_class=HelpFormatter)
    add = result.add_argument
    add("stage", choices=("all", "autoencoder", "experts", "structure", "latents", "decoder", "refinement"))
    add("--config", required=True, help=f"recipe: a JSON file or one of {', '.join(presets())}")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="change an entry of the recipe, as in experts.steps=1000; may be repeated",
    )
    add("--data", type=Path, metavar="DIR", help="photographs, at any depth; damaged ones are skipped")
    add("--val", type=Path, metavar="DIR", help="photographs to validate on; also keeps checkpoint-best")
    add("--latents", type=Path, metavar="DIR", help="decoder: latents that moesr-train latents made")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="directory to write this stage to")
    add("--from", type=Path, dest="start", metavar="DIR", help="checkpoint directory of the previous stage")
    add("--expert", type=int, metavar="K", help="experts: train only expert K (0 has the lowest noise)")
    add("--init", type=Path, metavar="DIR", help="checkpoint with start weights, for stages with --from")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch (default)")
    add("--workers", type=int, default=0, help="data-loader processes (default: %(default)s)")
    add("--tensorboard", action="store_true", help="also write scalars and images for TensorBoard")
    add("--dry-run", action="store_true", help="measure parameters, memory and speed; write nothing")
    add("--quiet", action="store_true", help="no progress bar, warnings only")
    add("--debug", action="store_true", help="show where an internal error was raised")
    return result


if __name__ == "__main__":
    sys.exit(main())
