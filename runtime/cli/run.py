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
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesr.runtime.cli.engine_options import (
    add_engine_options,
    engine_options,
    name_argument,
    path_argument,
)
from moesr.runtime.cli.sizes import scale_argument, size_argument
from moesr.runtime.errors import UsageError
from moesr.runtime.system import console

if TYPE_CHECKING:
    from moesr.runtime.cli.batch import RunOptions

EXTENSIONS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tif": ".tif"}
"""Extensions of result files by the names of formats."""

RANDOM = "random"

log = logging.getLogger("moesr")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `moesr-run`; returns the exit code."""
    return console.run_program("moesr-run", parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; returns the exit code."""
    from moesr.runtime import options
    from moesr.runtime.cli import batch, info, outputs, stdio
    from moesr.runtime.loop.settings import OPTION_NAMES, check_options
    from moesr.runtime.upscaler import Upscaler

    if args.info:
        info.show(args.info)
        return 0
    _check(args)
    if args.progress == "json":
        console.use_json()
    settings = {name: getattr(args, name, None) for name in OPTION_NAMES}
    if args.seed == RANDOM:
        settings["seed"] = secrets.randbits(32)
        log.info("seed %d", settings["seed"])
    check_options(settings)
    options.check_threads(args.threads)
    options.check_device(args.device)
    with stdio.piped(args.inputs, args.output, _extension(args)) as paths:
        outputs.check_usage(paths.inputs, paths.output)
        how = _run_options(args, to_stdout=paths.result is not None)
        with Upscaler(args.engine, **engine_options(args)) as upscaler:
            code = batch.run(upscaler, paths.inputs, paths.output, settings, how)
        paths.send()
        return code


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError for missing inputs and for options that contradict each other."""
    if not args.inputs:
        raise UsageError("no INPUT, expected image files or directories; --help explains all options")
    if args.suffix is not None and any(character in args.suffix for character in ("/", os.sep, "\0")):
        raise UsageError(f"--suffix is {args.suffix!r}, expected part of a file name, without slashes")
    from moesr.runtime.cli.stdio import descriptor_of

    named = _named_extension(args.output)
    if args.format and named and named != EXTENSIONS[args.format]:
        raise UsageError(f"--format is {args.format}, but -o names a {named} file; leave one of them out")
    if args.quality is not None and not 1 <= args.quality <= 100:
        raise UsageError(f"--quality is {args.quality}, expected a whole number from 1 to 100")
    if args.compare and args.output and descriptor_of(Path(args.output)) is not None:
        raise UsageError("--compare writes a page beside the result; name a file or directory with -o")
    extension = named or _extension(args)
    if args.quality is not None and extension not in (".jpg", ".webp"):
        raise UsageError(f"--quality has no meaning for {extension[1:]}; use it with --format jpg or webp")


def _named_extension(output: str | None) -> str:
    """The usual extension of the format of an output that is named as a file; "" for other outputs."""
    from moesr.runtime.cli.inputs import is_directory

    if not output or output.endswith(("/", os.sep)):
        return ""
    extension = Path(output).suffix.lower()
    usual = {".jpeg": ".jpg", ".tiff": ".tif"}.get(extension, extension)
    return usual if usual in (*EXTENSIONS.values(), ".bmp") and not is_directory(Path(output)) else ""


def _extension(args: argparse.Namespace) -> str:
    return EXTENSIONS[args.format or "png"]


def _run_options(args: argparse.Namespace, to_stdout: bool) -> RunOptions:
    from moesr.runtime.cli.batch import RunOptions
    from moesr.runtime.cli.preclean import PreCleaner

    return RunOptions(
        force=args.force,
        recursive=args.recursive,
        size=args.scale or args.size,
        suffix=args.suffix,
        extension=_extension(args),
        quality=args.quality,
        all_frames=args.frames == "all",
        preserve_times=args.preserve_times,
        compare=args.compare,
        fail_fast=args.fail_fast,
        any_seed=args.seed == RANDOM,
        quiet=args.quiet,
        json_progress=args.progress == "json",
        log=args.log,
        pre_clean=PreCleaner(args.pre_clean, args.threads) if args.pre_clean else None,
        to_stdout=to_stdout,
    )


def parser() -> argparse.ArgumentParser:
    """The command line of `moesr-run`."""
    p = argparse.ArgumentParser("moesr-run", description=__doc__, formatter_class=console.HelpFormatter)
    p.add_argument(
        "inputs",
        nargs="*",
        type=path_argument,
        metavar="INPUT",
        help="image file, directory of images, or - for standard input",
    )
    _add_output_options(p)
    _add_image_options(p)
    _add_report_options(p)
    add_engine_options(p)
    return p


def _add_output_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("files")
    group.add_argument(
        "-o",
        "--output",
        type=name_argument,
        metavar="OUT",
        help="file, directory, or - for standard output; a name without extension is a directory (default: "
        "beside each input)",
    )
    group.add_argument(
        "--recursive", action="store_true", help="include subdirectories, and make the same ones in OUT"
    )
    group.add_argument("--format", choices=EXTENSIONS, help="format of results (default: png)")
    group.add_argument("--quality", type=int, metavar="Q", help="1 to 100, of jpg and webp (default: 95)")
    group.add_argument(
        "--suffix",
        metavar="TEXT",
        help="end of the names of results, before the extension (default: the scale or size, such as _x4)",
    )
    group.add_argument(
        "--frames",
        choices=("first", "all"),
        default="first",
        help="frames of animations and pages of TIFF files to use; all frames become one animated png or "
        "webp, or the pages of one tif (default: %(default)s)",
    )
    group.add_argument(
        "--preserve-times", action="store_true", help="give results the modification times of their inputs"
    )
    group.add_argument("--force", action="store_true", help="make results again and overwrite files")
    group.add_argument(
        "--compare",
        action="store_true",
        help="also write NAME_compare.html for each result: input, bicubic and result with a slider",
    )


def _add_report_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("reports")
    group.add_argument(
        "--info",
        type=path_argument,
        metavar="FILE",
        help="print the input, engine and settings of a result, and the command that makes it again; no "
        "other work is done",
    )
    group.add_argument(
        "--log",
        type=path_argument,
        metavar="FILE",
        help="append a line of JSON for each input: input, result, settings, seconds, warnings, error",
    )
    group.add_argument(
        "--progress",
        choices=("bar", "json"),
        default="bar",
        help="bar, or a line every ten seconds if stderr is no terminal; json: every line on stderr is a "
        "JSON object (default: %(default)s)",
    )
    group.add_argument("--fail-fast", action="store_true", help="stop after the first input that fails")
    group.add_argument(
        "--quiet", action="store_true", help="print no progress and no notes, only warnings and errors"
    )


def _add_image_options(p: argparse.ArgumentParser) -> None:
    from moesr.runtime.images.color import COLOR_FIXES
    from moesr.runtime.options import DEFAULT_COLOR_FIX, DEFAULT_SEED
    from moesr.runtime.sampling.samplers import SAMPLERS

    group = p.add_argument_group("size, quality and time")
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--scale",
        type=scale_argument,
        metavar="S",
        help="scale of results, such as 2 or 2.5, by resampling the engine's result; beyond the engine's "
        "scale, the image passes through the engine twice (default: the engine's scale)",
    )
    size.add_argument(
        "--size",
        type=size_argument,
        metavar="WxH",
        help="exact size of results in pixels, such as 1920x1080; 1920x or x1080 keep the proportions",
    )
    group.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the engine's)")
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="ddpm adds noise at every step; ddim and dpm++2m add none, and dpm++2m is of second order, for "
        "few steps (default: the engine's)",
    )
    group.add_argument(
        "--seed",
        type=_seed,
        default=DEFAULT_SEED,
        metavar="N",
        help="seed of the noise; the same seed gives the same result. random takes a new one, prints it and "
        "records it (default: %(default)s)",
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
        "--keep-colors-under-alpha",
        action="store_true",
        help="keep the colors of fully transparent pixels, for textures that have a mask in alpha",
    )
    group.add_argument(
        "--reuse",
        type=int,
        default=1,
        metavar="N",
        help="compute the deep levels of an expert at one step in N and reuse their features in between: "
        "faster, less exact; needs an engine of moesr-export --reuse (default: %(default)s, at every step)",
    )


def _seed(text: str) -> int | str:
    try:
        return text if text == RANDOM else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a whole number or {RANDOM}") from None


if __name__ == "__main__":
    sys.exit(main())
