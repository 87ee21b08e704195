"""Import published weights as a checkpoint directory that moesr-export reads.

The sizes of the networks are inferred from the weights. Give the experts in order, lowest noise first. If a
file holds exponential moving averages (EMA) of the weights, these are used. With --decoder and without
--experts, the checkpoint holds only a decoder; an autoencoder of Stable Diffusion, with or without a
refinement network, becomes one for moesr-decode. --stablesr and --cfw import StableSR; --stable-diffusion
imports Stable Diffusion 2, which StableSR is trained on.
Exit codes: 0 done, 1 a file cannot be used or written, 2 usage, 4 out of memory, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moesr.runtime.system.console import HelpFormatter, run_program
from moesr.training.config import StableSRUNetConfig, UNetConfig, VaeConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `moesr-import`; returns the exit code."""
    return run_program("moesr-import", parser, run, argv, interrupted="nothing was written", extra="export")


def run(args: argparse.Namespace) -> int:
    """Run the import that the parsed arguments describe; returns the exit code."""
    from moesr.training.importing import command

    return command.run(args)


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser("moesr-import", description=__doc__, formatter_class=_HelpFormatter)
    _add_weight_files(p)
    _add_model(p)
    add = p.add_argument
    add("--fp16", action="store_true", help="store the weights in half precision")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    add("--debug", action="store_true", help="show where an internal error was raised")
    add("--force", action="store_true", help="replace an existing checkpoint directory")
    return p


def _add_weight_files(p: argparse.ArgumentParser) -> None:
    """Add the options that name the published weight files."""
    add = p.add_argument
    add(
        "--experts",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="one weight file per sampling expert, lowest noise first; one file for plain latent diffusion",
    )
    add(
        "--decoder",
        type=Path,
        metavar="FILE",
        help="weights of the autoencoder, or of a whole latent diffusion model, or a diffusers directory of "
        "Stable Diffusion",
    )
    add("--stablesr", type=Path, metavar="FILE", help="weights of StableSR: 512, Turbo, 768v or faces")
    add(
        "--cfw",
        type=Path,
        metavar="FILE",
        help="weights of StableSR's autoencoder with controllable feature wrapping",
    )
    add(
        "--stable-diffusion",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="weights of Stable Diffusion 2: one file, a diffusers directory, or its three files",
    )


def _add_model(p: argparse.ArgumentParser) -> None:
    """Add the options for the output and for properties of the model that its weights do not show."""
    add = p.add_argument
    add(
        "--prediction",
        choices=("eps", "v"),
        help="prediction of StableSR or Stable Diffusion (default: inferred from the file name)",
    )
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="checkpoint directory to write")
    add("--scale", type=int, choices=(4, 8), help="upscaling factor the model was trained for (default: 4)")
    add(
        "--latent-scale",
        type=_scaling_factor,
        metavar="X",
        help="scaling factor of the latents of a text-to-image model's autoencoder (default: that in the "
        f"diffusers directory, or {VaeConfig.latent_scale})",
    )
    add("--name", metavar="NAME", help="name of the model (default: from its kind and scale)")
    add(
        "--head-channels",
        type=_positive,
        metavar="N",
        help="channels per attention head, which cannot be inferred from the weights (default: "
        f"{UNetConfig.head_channels}, for StableSR {StableSRUNetConfig.head_channels})",
    )
    add(
        "--norm-groups",
        type=_positive,
        default=UNetConfig.norm_groups,
        metavar="N",
        help="groups of every GroupNorm, which cannot be inferred from the weights",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _scaling_factor(text: str) -> float:
    value = float(text)
    if not 1e-6 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{value:g} is not between 1e-6 and 1e6")
    return value


class _HelpFormatter(HelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default in (None, [], False):
            return action.help
        return super()._get_help_string(action)


if __name__ == "__main__":
    sys.exit(main())
