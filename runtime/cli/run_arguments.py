"""The options of `moesr-run`, in the groups of its help."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from moesr.runtime.cli.engine_options import name_argument, path_argument
from moesr.runtime.cli.sizes import scale_argument, size_argument
from moesr.runtime.errors import UsageError

EXTENSIONS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tif": ".tif"}
"""Extensions of result files by the names of formats."""

RANDOM = "random"
"""The value of `--seed` that stands for a new random seed."""


def add_output_options(p: argparse.ArgumentParser) -> None:
    """Add the options about files: where results go, their names and their format."""
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
        "--recursive",
        action="store_true",
        help="include subdirectories, and create the same subdirectories in OUT",
    )
    group.add_argument("--format", choices=EXTENSIONS, help="format of results (default: png)")
    group.add_argument(
        "--quality", type=int, metavar="Q", help="quality of jpg and webp, 1 to 100 (default: 95)"
    )
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


def add_report_options(p: argparse.ArgumentParser) -> None:
    """Add the options about the program's messages."""
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
        "--quiet", action="store_true", help="print neither progress nor notes, only warnings and errors"
    )


def add_cluster_options(p: argparse.ArgumentParser) -> None:
    """Add the options about running on many machines."""
    group = p.add_argument_group("cluster")
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on a cluster of Ray: auto, HOST:PORT or ray://HOST:PORT (default: $RAY_ADDRESS, or this "
        "machine). INPUT and OUT may be URLs: s3://, gs://, az://, file://. See docs/cluster.md",
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="most workers, each with the engine (default: what fits)"
    )
    group.add_argument(
        "--cpus-per-worker", type=float, metavar="N", help="cores of a worker (default: --threads, or 1)"
    )
    group.add_argument(
        "--gpus-per-worker", type=float, metavar="N", help="GPUs of a worker, such as 0.5 (default: 0)"
    )
    group.add_argument(
        "--memory-per-worker",
        type=float,
        metavar="GB",
        help="memory of a worker (default: an estimate for the engine and images of one megapixel)",
    )


_ADDRESS = re.compile(r"auto|local|ray://.+|[\w.\-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")


def settle_inputs(args: argparse.Namespace) -> None:
    """Make paths of the inputs, apart from URLs, which are for --ray.

    A word after --ray that is no address is an input. UsageError for a URL without --ray.
    """
    if args.ray and not _ADDRESS.fullmatch(args.ray):
        args.inputs.insert(0, args.ray)
        args.ray = ""
    if args.ray is not None:
        return
    for name in ("workers", "cpus_per_worker", "gpus_per_worker", "memory_per_worker"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for runs with --ray")
    for name in (*args.inputs, args.output or ""):
        if re.match(r"(s3|gs|az|file)://", name):
            raise UsageError(f"{name}: is a URL; add --ray to read and write URLs")
    args.inputs = [Path(name) for name in args.inputs]


def add_size_options(p: argparse.ArgumentParser) -> None:
    """Add the options about the size of results."""
    size = p.add_argument_group("size").add_mutually_exclusive_group()
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


def add_sampling_options(p: argparse.ArgumentParser) -> None:
    """Add the options about the steps of the sampler."""
    from moesr.runtime.loop.tile_layout import TILINGS
    from moesr.runtime.options import DEFAULT_SEED
    from moesr.runtime.sampling.samplers import SAMPLERS

    group = p.add_argument_group("sampling")
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
        "--reuse",
        type=int,
        default=1,
        metavar="N",
        help="compute the deep levels of an expert at one step in N and reuse their features in between: "
        "faster, less exact; needs an engine of moesr-export --reuse (default: %(default)s, at every step)",
    )
    group.add_argument(
        "--start-step",
        type=int,
        default=0,
        metavar="K",
        help="leave out the first K steps and begin with the noised latent of the input; experts that no "
        "step needs are not loaded. With the bundled engines, fewer --steps are better in the same time "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        default=0,
        metavar="N",
        help="save the latent in the cache after every N steps; after a kill the same command goes on there, "
        "with the same result (default: %(default)s, never)",
    )
    group.add_argument(
        "--tiling",
        choices=TILINGS,
        help="tiles of large images: overlap, the wide overlap of the published samplers; shifted, a narrow "
        "overlap on a grid that moves from step to step, which needs fewer tiles (default: shifted, or the "
        "engine's own overlap if it defines one)",
    )


def add_appearance_options(p: argparse.ArgumentParser) -> None:
    """Add the options about the look of results."""
    from moesr.runtime.images.color import COLOR_FIXES
    from moesr.runtime.options import DEFAULT_COLOR_FIX

    group = p.add_argument_group("appearance")
    group.add_argument(
        "--color-fix",
        choices=COLOR_FIXES,
        default=DEFAULT_COLOR_FIX,
        help="method that moves the result's colors towards the input's (default: %(default)s)",
    )
    group.add_argument(
        "--fidelity",
        type=float,
        metavar="W",
        help="from 0, a free result, to 1, one that follows the input closely (default: the engine's)",
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
        help="clean severely degraded inputs first with this super-resolution network (ONNX, any scale, RGB "
        "in 0..1); results have the same size as without",
    )
    group.add_argument(
        "--tileable",
        action="store_true",
        help="for seamless textures: opposite sides of the input meet, and so do those of the result",
    )
    group.add_argument(
        "--keep-colors-under-alpha",
        action="store_true",
        help="keep the colors of fully transparent pixels, for textures that have a mask in alpha",
    )


def _seed(text: str) -> int | str:
    try:
        return text if text == RANDOM else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a whole number or {RANDOM}") from None
