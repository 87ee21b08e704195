"""Super-resolve images with an engine.

Each INPUT is an image file or a directory of images. Results go to OUT, which is a file (for one input file)
or a directory; without -o they go beside their inputs as NAME_x4.png. Every result holds a record of its
input, engine and settings. An input that has a result already is skipped; if that was made with other
settings, the input is skipped with a note (in a directory) or refused (if it was named), and --force makes
it again.
Exit codes: 0 all done, 1 some inputs failed, 2 wrong usage, 3 engine unusable, 4 out of memory,
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moesr.runtime.cli.engine_options import (
    add_engine_options,
    engine_options,
    name_argument,
    path_argument,
)
from moesr.runtime.system import console


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `moesr-run`; returns the exit code."""
    return console.run_program("moesr-run", parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit code."""
    from moesr.runtime import options
    from moesr.runtime.cli import batch, outputs
    from moesr.runtime.cli.preclean import PreCleaner
    from moesr.runtime.loop.settings import OPTION_NAMES, check_options
    from moesr.runtime.upscaler import Upscaler

    settings = {name: getattr(args, name) for name in OPTION_NAMES}
    check_options(settings)
    options.check_threads(args.threads)
    options.check_device(args.device)
    outputs.check_usage(args.inputs, args.output)
    cleaner = PreCleaner(args.pre_clean, args.threads) if args.pre_clean else None
    how = {"force": args.force, "quiet": args.quiet, "pre_clean": cleaner}
    with Upscaler(args.engine, **engine_options(args)) as upscaler:
        return batch.run(upscaler, args.inputs, args.output, settings, **how)


def parser() -> argparse.ArgumentParser:
    """The command line of `moesr-run`."""
    p = argparse.ArgumentParser("moesr-run", description=__doc__, formatter_class=console.HelpFormatter)
    p.add_argument(
        "inputs", nargs="+", type=path_argument, metavar="INPUT", help="image file or directory of images"
    )
    _add_output_options(p)
    _add_image_options(p)
    add_engine_options(p)
    return p


def _add_output_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("results")
    group.add_argument(
        "-o",
        "--output",
        type=name_argument,
        metavar="OUT",
        help="file or directory; a name without extension is a directory (default: beside each input)",
    )
    group.add_argument("--force", action="store_true", help="overwrite results that exist")
    group.add_argument(
        "--quiet", action="store_true", help="print no progress and no notes, only warnings and errors"
    )


def _add_image_options(p: argparse.ArgumentParser) -> None:
    from moesr.runtime.images.color import COLOR_FIXES
    from moesr.runtime.options import DEFAULT_COLOR_FIX, DEFAULT_SEED
    from moesr.runtime.sampling.samplers import SAMPLERS

    group = p.add_argument_group("image quality and time")
    group.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the engine's)")
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="ddpm adds noise at every step; ddim and dpm++2m add none, and dpm++2m is of second order, for "
        "few steps (default: the engine's)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        help="seed of the noise; the same seed gives the same result (default: %(default)s)",
    )
    group.add_argument(
        "--color-fix",
        choices=COLOR_FIXES,
        default=DEFAULT_COLOR_FIX,
        help="method that moves the result's colors towards the input's (default: %(default)s)",
    )
    group.add_argument(
        "--fidelity", type=float, metavar="W", help="0, free, to 1, faithful (default: the engine's)"
    )
    group.add_argument(
        "--guidance",
        type=float,
        metavar="S",
        help="strength of the prompts: 1 is no guidance, 0 only the negative prompt, above 1 away from the "
        "negative prompt (default: the engine's)",
    )
    group.add_argument(
        "--pre-clean",
        type=path_argument,
        metavar="FILE",
        help="clean severely degraded inputs first, with this super-resolution network (ONNX, any scale, RGB "
        "in 0..1); results have the same size as without",
    )
    group.add_argument(
        "--reuse",
        type=int,
        default=1,
        metavar="N",
        help="compute the deep levels of an expert at one step in N and reuse their features in between: "
        "faster, less exact; needs an engine of moesr-export --reuse (default: %(default)s, at every step)",
    )


if __name__ == "__main__":
    sys.exit(main())
