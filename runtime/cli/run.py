"""Super-resolve images with an engine.

Each INPUT is an image file or a directory of images. Results go to OUT: a file (for one input file), or a
directory (that exists, ends in a slash, or takes several results); without -o they go beside their inputs as
NAME_x4.png. What is done already is not done again: results are known by what is written in them.
Exit codes: 0 all done, 1 some inputs failed, 2 usage, 3 engine unusable, 4 out of memory,
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moesr.runtime.cli.engine_options import _name, _path, add_engine_options, engine_options
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
    from moesr.runtime.engine.manifest import SAMPLERS
    from moesr.runtime.images.color import COLOR_FIXES
    from moesr.runtime.options import DEFAULT_COLOR_FIX, DEFAULT_SEED

    p = argparse.ArgumentParser("moesr-run", description=__doc__, formatter_class=console.HelpFormatter)
    p.add_argument("inputs", nargs="+", type=_path, metavar="INPUT", help="image file or directory of images")
    p.add_argument(
        "-o", "--output", type=_name, metavar="OUT", help="file or directory (default: beside each input)"
    )
    p.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the engine's)")
    p.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="ddpm adds noise at every step, ddim none, nor does dpm++2m, which is of second order and meant "
        "for few steps (default: the engine's)",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        help="of the noise; same seed, same result (default: %(default)s)",
    )
    p.add_argument(
        "--color-fix",
        choices=COLOR_FIXES,
        default=DEFAULT_COLOR_FIX,
        help="towards the input's colors (default: %(default)s)",
    )
    p.add_argument("--fidelity", type=float, metavar="W", help="0 free to 1 faithful (default: the engine's)")
    p.add_argument(
        "--guidance",
        type=float,
        metavar="S",
        help="strength by which prompts guide: 1 none, 0 the negative prompt alone, beyond 1 away from it "
        "(default: the engine's)",
    )
    p.add_argument(
        "--pre-clean",
        type=_path,
        metavar="FILE",
        help="clean severely degraded inputs by this ONNX network of any scale, RGB in 0..1; the engine sees "
        "its result, halved, and results are as large as without",
    )
    p.add_argument(
        "--reuse",
        type=int,
        default=1,
        metavar="N",
        help="compute the deep levels of an expert at one step in N and reuse their features in between: "
        "faster, less exact; needs an engine of moesr-export --reuse (default: %(default)s, at every step)",
    )
    p.add_argument("--force", action="store_true", help="overwrite results that exist")
    add_engine_options(p)
    p.add_argument(
        "--quiet", action="store_true", help="no progress bar and no notes, only warnings and errors"
    )
    return p


if __name__ == "__main__":
    sys.exit(main())
