"""Decode latents of a text-to-image model to images.

Each LATENT is a .npy, .safetensors or .pt file of latents [C, h, w] or [B, C, h, w], or a directory of such
files. Latents are divided by the engine's scaling factor (0.18215 for Stable Diffusion 1 and 2), unless
--unscaled says that this has been done. Results go to OUT, which is a file (for one latent) or a directory;
without -o they go beside their inputs as NAME.png, and those of a batch as NAME_1.png, NAME_2.png and so on.
A result that exists is handled as by moesr-run. The engine is exported from an autoencoder.
With --reconstruct the inputs are images, which are encoded and decoded, with and without the refinement
network; a table compares both with the originals, and -o DIR keeps it together with a figure.
Exit codes: 0 all done, 1 some inputs failed, 2 wrong usage, 3 engine unusable, 4 out of memory,
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moesr.runtime.cli.engine_options import add_engine_options, engine_options, name_argument, path_argument
from moesr.runtime.cli.run_arguments import EXTENSIONS
from moesr.runtime.errors import UsageError
from moesr.runtime.system import console

log = logging.getLogger("moesr")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moesr-decode` and return its exit code."""
    return console.run_program("moesr-decode", parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say and return the exit code."""
    from moesr.runtime import options
    from moesr.runtime.autoencoder import Autoencoder
    from moesr.runtime.cli import decode_batch, reconstruct
    from moesr.runtime.cli.outputs import check_usage

    _check(args)
    if args.progress == "json":
        console.use_json()
    options.check_threads(args.threads)
    options.check_device(args.device)
    how = decode_batch.DecodeOptions(
        force=args.force,
        recursive=args.recursive,
        suffix=args.suffix or "",
        extension=EXTENSIONS[args.format or "png"],
        quality=args.quality,
        scaled=not args.unscaled,
        refined=not args.no_refinement,
        fail_fast=args.fail_fast,
        quiet=args.quiet,
        json_progress=args.progress == "json",
        log=args.log,
    )
    paths = [Path(name) for name in args.inputs]
    if not args.reconstruct:
        check_usage(paths, args.output)
    with Autoencoder(args.engine, **engine_options(args)) as vae:
        if args.reconstruct:
            return reconstruct.run(vae, paths, args.output, how)
        return decode_batch.run(vae, paths, args.output, how)


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError for missing inputs and for options that contradict each other."""
    if not args.inputs:
        raise UsageError("no LATENT, expected files of latents or directories; --help explains all options")
    if args.suffix is not None and any(character in args.suffix for character in ("/", os.sep, "\0")):
        raise UsageError(f"--suffix is {args.suffix!r}, expected part of a file name, without slashes")
    if args.quality is not None and not 1 <= args.quality <= 100:
        raise UsageError(f"--quality is {args.quality}, expected a whole number from 1 to 100")
    named = Path(args.output).suffix.lower() if args.output else ""
    if (
        args.quality is not None
        and args.format not in ("jpg", "webp")
        and named not in (".jpg", ".jpeg", ".webp")
    ):
        raise UsageError("--quality is for jpg and webp; use it with --format jpg or webp")
    if args.reconstruct and (args.unscaled or args.no_refinement):
        raise UsageError("--reconstruct makes its own latents; leave out --unscaled and --no-refinement")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line of `moesr-decode`."""
    p = argparse.ArgumentParser("moesr-decode", description=__doc__, formatter_class=console.HelpFormatter)
    p.add_argument(
        "inputs",
        nargs="*",
        type=name_argument,
        metavar="LATENT",
        help="file of latents, or directory of such files; with --reconstruct image or directory of images",
    )
    _add_decoding(p.add_argument_group("decoding"))
    _add_files(p.add_argument_group("files"))
    _add_reports(p.add_argument_group("reports"))
    add_engine_options(p, required="engine directory, exported from an autoencoder")
    return p


def _add_decoding(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--unscaled",
        action="store_true",
        help="the latents have been divided by the scaling factor already",
    )
    group.add_argument("--no-refinement", action="store_true", help="leave the refinement network out")
    group.add_argument(
        "--reconstruct",
        action="store_true",
        help="measure PSNR, SSIM and the correlation of spectra of images that are encoded and decoded",
    )


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "-o",
        "--output",
        type=name_argument,
        metavar="OUT",
        help="file or directory; a name without extension is a directory (default: beside each input)",
    )
    add("--recursive", action="store_true", help="include subdirectories")
    add("--format", choices=EXTENSIONS, help="format of results (default: png)")
    add("--quality", type=int, metavar="Q", help="quality of jpg and webp, 1 to 100 (default: 95)")
    add("--suffix", metavar="TEXT", help="end of the names of results, before the extension (default: none)")
    add("--force", action="store_true", help="make results again and overwrite files")


def _add_reports(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--log", type=path_argument, metavar="FILE", help="append a line of JSON for each result")
    add(
        "--progress",
        choices=("bar", "json"),
        default="bar",
        help="bar, or json: every line on stderr is a JSON object (default: %(default)s)",
    )
    add("--fail-fast", action="store_true", help="stop after the first input that fails")
    add("--quiet", action="store_true", help="print neither progress nor notes, only warnings and errors")


if __name__ == "__main__":
    sys.exit(main())
