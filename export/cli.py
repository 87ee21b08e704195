"""Export a checkpoint as an engine directory for moesr-run.

Every graph is compared with its PyTorch network before anything is published; the manifest holds the measured
error. Without CHECKPOINT the x4 demo checkpoint that comes with moesr is exported; demo-x8 names the x8 one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesr.export.lowering import INT8_ERROR, SHALLOW_BLOCKS
from moesr.export.prompts import GUIDANCE, PromptOptions
from moesr.runtime.engine.locate import demo_name
from moesr.runtime.errors import UsageError
from moesr.runtime.options import check_guidance
from moesr.runtime.system import console

if TYPE_CHECKING:
    import numpy as np

    from moesr.runtime.engine.manifest import Manifest

MEGA = 1e6
PLAN_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moesr-export` and return its exit code.

    0 done, 1 a checkpoint that cannot be read or an engine that cannot be written, 2 usage, 3 no parity,
    4 out of memory, 128 and a signal's number where that ended it.
    """
    return console.run_program(
        "moesr-export",
        parser,
        _export,
        argv,
        interrupted="nothing was written",
        out_of_memory="close other programs, or take a smaller --tile",
        extra="export",
    )


def _export(args: argparse.Namespace) -> int:
    from moesr.export import package, tensorrt  # --help does not wait for torch
    from moesr.kernels.plan import check_compiler
    from moesr.runtime.backends.tensorrt.library import load
    from moesr.training.checkpoint import load_checkpoint

    if args.guidance is not None:
        check_guidance(args.guidance)
    checkpoint = load_checkpoint(package.checkpoint_directory(args.checkpoint))
    precision, kernels = args.precision, args.tensorrt and not args.no_kernels
    photographs = _photographs(args) if precision == "int8" else ()
    if args.tensorrt:
        check_compiler()  # what is missing is missed before any work
        tensorrt.check_precision(precision, tensorrt.capabilities(load(), args.capability))
        args.target = "both" if args.target == "cpu" else args.target
    own = next(iter(package.lowerings(args.target, precision, args.store).values()))
    directory = args.output or Path(f"{checkpoint.config.name}-{own.precision}")
    done = itertools.count()
    reuse = args.reuse is not None
    stages = package.stage_count(checkpoint.config, args.target, kernels, precision, reuse=reuse)
    with console.bar(args.quiet, total=stages, unit="stage") as bar:

        def on_stage(stage: str) -> None:
            bar.n = next(done)
            bar.set_description(stage)

        manifest = package.export_engine(
            checkpoint,
            directory,
            target=args.target,
            precision=precision,
            store=args.store,
            tile_px=args.tile,
            wish=PromptOptions(args.prompt, args.negative_prompt, args.guidance),
            kernels=kernels,
            photographs=photographs,
            int8_error=args.int8_error,
            residuals=args.residuals,
            reuse=args.reuse,
            force=args.force,
            on_stage=on_stage,
        )
        bar.n = stages
        bar.refresh()
    if not args.quiet:
        console.say(f"wrote {directory} ({_summary(manifest, directory)})")
    if args.tensorrt:
        _prepare_gpu(args, directory, manifest)
    return 0


def _photographs(args: argparse.Namespace) -> Sequence[np.ndarray]:
    """What int8 is calibrated on: those of a folder, or for a bundled model those of Python packages."""
    from moesr.export.quantisation import calibration

    if args.calibrate is None and demo_name(args.checkpoint) is None:
        raise UsageError(
            "--int8 is calibrated on photographs like those that the engine is for, 8 or so: name a folder "
            "of them with --calibrate"
        )
    if args.calibrate is None:
        return calibration.demo_photographs(args.photographs)
    return calibration.photographs(args.calibrate, args.photographs)


def _prepare_gpu(args: argparse.Namespace, directory: Path, manifest: Manifest) -> None:
    """Build TensorRT plans, and the kernels around and between them, into an engine directory."""
    from moesr.export import tensorrt
    from moesr.runtime.backends.tensorrt.library import load

    targets = tensorrt.capabilities(load(), args.capability)
    with console.bar(args.quiet, total=1.0, bar_format=PLAN_BAR) as bar:

        def on_stage(stage: str, share: float) -> None:
            bar.n = share
            bar.set_description(stage)

        built = tensorrt.build_plans(directory, manifest, targets, on_stage=on_stage)
        bar.set_description("kernels")
        kernels = tensorrt.build_kernels(directory, manifest, targets)
    if not args.quiet:
        size = sum(plan.nbytes for plan in built) / MEGA
        where = directory / "tensorrt"
        console.say(f"built {len(built)} plans in {where} ({size:.1f} MB) and kernels in {kernels}")


def _summary(manifest: Manifest, directory: Path) -> str:
    arrangements = [a for graph in manifest.graphs.values() for a in graph.arrangements]
    proofs = [a.parity.relative_l2 for a in arrangements if a.parity]
    precisions = dict.fromkeys(a.precision for a in arrangements)
    size = sum((directory / file.file).stat().st_size for file in manifest.files)
    return (
        f"{manifest.name}, {' and '.join(precisions)}, tile {manifest.tile} px, "
        f"{len(manifest.experts)} experts, {size / MEGA:.1f} MB; "
        f"largest error {max(proofs):.1e} against the network"
    )


def _two_or_more(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number from 2 on")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")
    return value


def _capability(text: str) -> int:
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal() and len(minor) == 1):
        raise argparse.ArgumentTypeError(f"{text!r}, expected two numbers such as 8.9")
    return 10 * int(major) + int(minor)


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser("moesr-export", description=__doc__, formatter_class=console.HelpFormatter)
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
        "--target",
        choices=["cpu", "gpu", "both"],
        default="cpu",
        help="what the graphs are arranged for, though all but bf16 run on either; with both the engine "
        "holds a second file of each graph (default: cpu)",
    )
    precisions = p.add_mutually_exclusive_group()
    p.set_defaults(precision="fp32")
    precisions.add_argument(
        "--fp16",
        action="store_const",
        const="fp16",
        dest="precision",
        help="half precision weights and arithmetic, float32 where the model needs it; with --target both "
        "for the GPU's graphs alone (default: float32)",
    )
    precisions.add_argument(
        "--bf16",
        action="store_const",
        const="bf16",
        dest="precision",
        help="bfloat16 arithmetic on CPUs that are faster with it (with openvino; measured by moesr-run), "
        "float32 elsewhere; half the size; a GPU's graphs are bfloat16 throughout, for TensorRT on compute "
        "capability 8.0 and later",
    )
    precisions.add_argument(
        "--int8",
        action="store_const",
        const="int8",
        dest="precision",
        help="8-bit integers in most layers, for CPUs: wide models twice as fast, a quarter of the size; "
        "calibrated on photographs, for every expert at its own steps",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="FOLDER",
        help="with --int8, photographs like those that the engine is for (default, of the demo models alone: "
        "some that come with scikit-image and others)",
    )
    add(
        "--photographs",
        type=_two_or_more,
        default=8,
        metavar="N",
        help="with --int8, how many of them to take; graphs are proved on one of these (default: 8)",
    )
    add(
        "--int8-error",
        type=_positive,
        default=INT8_ERROR,
        metavar="E",
        help="with --int8, the relative error of every graph's result that it may cost: more leaves fewer "
        "layers in float32, and 1 none (default: %(default)g)",
    )
    add(
        "--store",
        choices=["fp32", "fp16"],
        default="fp32",
        help="how files hold the weights of float32 graphs: fp16 halves their size, and opening the engine "
        "casts them back (default: fp32)",
    )
    add(
        "--tensorrt",
        action="store_true",
        help="build TensorRT plans of the GPU's graphs and compile our kernels; implies --target both",
    )
    add(
        "--capability",
        nargs="+",
        type=_capability,
        default=[],
        metavar="X.Y",
        help="compute capabilities to build for, such as 8.9; no such GPU need be here with TensorRT for RTX "
        "(default: that of the GPU that is here)",
    )
    add(
        "--no-kernels",
        action="store_true",
        help="with --tensorrt, leave the decoder in one graph that needs none of our kernels inside",
    )
    add(
        "--residuals",
        choices=["reckoned", "plans", "kernels"],
        default="reckoned",
        help="with --tensorrt, what computes the refinement network's inverted residuals: plans, our kernel, "
        "or for each what takes less time by its bytes and products (default: reckoned)",
    )
    add(
        "--tile",
        type=int,
        metavar="PX",
        help="side of a tile in output pixels (default: what the model was trained on, 512 or 768)",
    )
    add(
        "--prompt",
        metavar="TEXT",
        help="what a model with a text encoder is told to make (default: the published one, which is empty "
        "without guidance)",
    )
    add(
        "--negative-prompt",
        metavar="TEXT",
        help="what it is told to avoid where guidance is used (default: the published one with --guidance, "
        "none without)",
    )
    add(
        "--guidance",
        type=float,
        metavar="S",
        help=f"default strength of guidance: 1 none, beyond 1 away from the negative prompt (default: 1, or "
        f"{GUIDANCE:g} with --negative-prompt)",
    )
    add(
        "--reuse",
        type=int,
        nargs="?",
        const=SHALLOW_BLOCKS,
        metavar="BLOCKS",
        help="add shallow graphs of the last BLOCKS output blocks, for moesr-run --reuse N between full "
        f"steps (default: none; without a number the last {SHALLOW_BLOCKS})",
    )
    add("--force", action="store_true", help="replace an existing engine directory")
    add("--quiet", action="store_true", help="no bar and no report, only errors")
    add("--debug", action="store_true", help="show where an internal error comes from")
    return p


if __name__ == "__main__":
    sys.exit(main())
