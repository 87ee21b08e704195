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
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesr.runtime.cli import run_arguments
from moesr.runtime.cli.engine_options import add_engine_options, engine_options, name_argument
from moesr.runtime.cli.run_arguments import EXTENSIONS, RANDOM
from moesr.runtime.errors import UsageError
from moesr.runtime.system import console

if TYPE_CHECKING:
    from moesr.runtime.cli.batch import RunOptions

CLUSTER = "moesr.runtime.cluster.run"

log = logging.getLogger("moesr")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moesr-run` and return its exit code."""
    return console.run_program("moesr-run", parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say and return the exit code."""
    import secrets

    from moesr.runtime import options
    from moesr.runtime.cli import batch, info, outputs, stdio
    from moesr.runtime.loop.settings import OPTION_NAMES, check_options
    from moesr.runtime.upscaler import Upscaler

    if args.info:
        info.show(args.info)
        return 0
    run_arguments.settle_inputs(args)
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
    if args.ray is not None:
        # The cluster imports this package, so it is looked up by name, as backends are.
        return importlib.import_module(CLUSTER).run(args, settings, _run_options(args, to_stdout=False))
    with stdio.piped(args.inputs, args.output, _extension(args)) as paths:
        outputs.check_usage(paths.inputs, paths.output)
        how = _run_options(args, to_stdout=paths.result is not None)
        with Upscaler(args.engine, **engine_options(args)) as upscaler:
            code = batch.run(upscaler, paths.inputs, paths.output, settings, how)
        paths.send()
        return code


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError for missing inputs and for options that contradict each other."""
    from moesr.runtime.cli.stdio import descriptor_of

    if not args.inputs:
        raise UsageError("no INPUT, expected image files or directories; --help explains all options")
    if args.suffix is not None and any(character in args.suffix for character in ("/", os.sep, "\0")):
        raise UsageError(f"--suffix is {args.suffix!r}, expected part of a file name, without slashes")
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
    """Return the usual extension of the format of an output file; "" for other outputs."""
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
    """Return the parser of the command line of `moesr-run`."""
    p = argparse.ArgumentParser("moesr-run", description=__doc__, formatter_class=console.HelpFormatter)
    p.add_argument(
        "inputs",
        nargs="*",
        type=name_argument,
        metavar="INPUT",
        help="image file, directory of images, or - for standard input; with --ray also a URL",
    )
    run_arguments.add_output_options(p)
    run_arguments.add_size_options(p)
    run_arguments.add_sampling_options(p)
    run_arguments.add_appearance_options(p)
    run_arguments.add_report_options(p)
    run_arguments.add_cluster_options(p)
    add_engine_options(p)
    return p


if __name__ == "__main__":
    sys.exit(main())
