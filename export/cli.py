"""Export a checkpoint as an engine directory for moesr-run, or as one ONNX file for other runtimes.

An autoencoder of a text-to-image model becomes an engine for moesr-decode.

Every graph is compared with its PyTorch network before anything is published; the manifest holds the measured
error. Without CHECKPOINT the x4 demo checkpoint that comes with moesr is exported; demo-x8 names the x8 one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moesr.export.lowering import INT8_ERROR, SHALLOW_BLOCKS
from moesr.export.options import ExportOptions
from moesr.export.prompts import GUIDANCE, PromptOptions
from moesr.export.single import command as single
from moesr.runtime.engine.locate import demo_name
from moesr.runtime.engine.manifest_file import MANIFEST_NAME
from moesr.runtime.errors import UsageError
from moesr.runtime.options import check_guidance
from moesr.runtime.system import console

if TYPE_CHECKING:
    import numpy as np

    from moesr.runtime.engine.manifest import Manifest

MEGA = 1e6
PLAN_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"


@dataclass
class Progress:
    """The progress of an export, from which a message tells what an interrupt leaves on disk."""

    directory: Path | None = None
    before: int | None = None  # the directory's inode before the export; None: it did not exist

    def begin(self, directory: Path) -> None:
        """Record whether the output directory exists already."""
        self.directory, self.before = directory, _inode(directory)

    @property
    def published(self) -> bool:
        """True once the engine directory has been renamed into place."""
        return self.directory is not None and _inode(self.directory) not in (None, self.before)

    def left_behind(self) -> str:
        """Describe what an interrupt leaves on disk."""
        if not self.published:
            return "nothing was written"
        return (
            f"the engine {self.directory} is complete, but its TensorRT plans and kernels are not; export "
            "again with --force to build them"
        )


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moesr-export` and return its exit code.

    0: done. 1: a checkpoint cannot be read or an engine cannot be written. 2: wrong usage. 3: a graph does
    not match its network. 4: out of memory. 128 plus a signal's number: ended by that signal.
    """
    progress = Progress()
    return console.run_program(
        "moesr-export",
        parser,
        functools.partial(_export, progress),
        argv,
        interrupted=progress.left_behind,
        out_of_memory="close other programs, or use a smaller --tile",
        extra="export",
    )


def _export(progress: Progress, args: argparse.Namespace) -> int:
    """Run the export that the arguments describe."""
    from moesr.export import package, tensorrt  # imported here so that --help does not load torch
    from moesr.kernels.plan import check_compiler
    from moesr.runtime.backends.tensorrt.library import load
    from moesr.training.checkpoint import load_checkpoint

    single.check_arguments(args)
    _check_push(args)
    if args.push and _is_engine(args.checkpoint):
        _push(args, args.checkpoint)
        return 0
    if args.guidance is not None:
        check_guidance(args.guidance)
    options = _options(args)
    checkpoint = load_checkpoint(package.checkpoint_directory(args.checkpoint))
    if args.single:
        return single.run(args, checkpoint, options)
    photographs = _photographs(args) if args.precision == "int8" else ()
    if args.tensorrt:  # report anything that is missing before the work begins
        check_compiler()
        tensorrt.check_precision(args.precision, tensorrt.capabilities(load(), args.capability))
    own = next(iter(options.lowerings().values()))
    directory = args.output or Path(f"{checkpoint.config.name}-{own.precision}")
    stages, done = package.stage_count(checkpoint.config, options), itertools.count()
    progress.begin(directory)
    with console.bar(args.quiet, total=stages, unit="stage") as bar:

        def on_stage(stage: str) -> None:
            bar.n = next(done)
            bar.set_description(stage)

        manifest = package.export_engine(
            checkpoint, directory, options, photographs=photographs, force=args.force, on_stage=on_stage
        )
        bar.n = stages
        bar.refresh()
    if not args.quiet:
        console.say(f"wrote {directory} ({_summary(manifest, directory)})")
    if args.tensorrt:
        _prepare_gpu(args, directory, manifest)
    if args.push:
        _push(args, directory)
    return 0


def _is_engine(path: Path | None) -> bool:
    return path is not None and (path / MANIFEST_NAME).is_file()


def _check_push(args: argparse.Namespace) -> None:
    """Raise UsageError, before the work begins, if the engine cannot be pushed as the options say."""
    if args.push is None:
        if args.private or args.message:
            raise UsageError("--private and --message need --push OWNER/NAME")
        return
    from moesr.export.push import check_target

    check_target(args.push)
    if _is_engine(args.checkpoint) and args.output:
        raise UsageError(f"{args.checkpoint}: is an engine and is pushed as it is; leave out -o")


def _push(args: argparse.Namespace, directory: Path) -> None:
    """Upload an engine directory to the hub."""
    from moesr.export.push import push

    name = push(directory, args.push, private=args.private, message=args.message or "")
    if not args.quiet:
        console.say(f"pushed to {name}")


def _options(args: argparse.Namespace) -> ExportOptions:
    """Return the export's options from the arguments; --tensorrt and --single imply graphs for GPUs."""
    target = args.target or ("gpu" if args.single else "cpu")
    return ExportOptions(
        target="both" if args.tensorrt and target == "cpu" else target,
        precision=args.precision,
        store=args.store,
        tile_px=args.tile,
        prompts=PromptOptions(args.prompt, args.negative_prompt, args.guidance),
        kernels=args.tensorrt and not args.no_kernels,
        residuals=args.residuals,
        int8_error=args.int8_error,
        reuse=args.reuse,
        polygraphy=args.polygraphy,
        preview=True,
    )


def _photographs(args: argparse.Namespace) -> Sequence[np.ndarray]:
    """Return the photographs for int8's calibration; for a demo model they may come from Python packages."""
    from moesr.export.quantisation import calibration

    if args.calibrate is None and demo_name(args.checkpoint) is None:
        raise UsageError(
            "--int8 needs about 8 photographs that resemble the engine's later input; name a folder of them "
            "with --calibrate"
        )
    if args.calibrate is None:
        return calibration.demo_photographs(args.photographs)
    return calibration.photographs(args.calibrate, args.photographs)


def _prepare_gpu(args: argparse.Namespace, directory: Path, manifest: Manifest) -> None:
    """Build TensorRT plans and compile kernels into a published engine directory."""
    from moesr.export import tensorrt
    from moesr.runtime.backends.tensorrt.library import load

    targets = tensorrt.capabilities(load(), args.capability)
    with console.bar(args.quiet, total=1.0, bar_format=PLAN_BAR) as bar:

        def on_stage(stage: str, fraction: float) -> None:
            bar.n = fraction
            bar.set_description(stage)

        built = tensorrt.build_plans(directory, manifest, targets, on_stage=on_stage)
        bar.set_description("kernels")
        kernels = tensorrt.build_kernels(directory, manifest, targets)
    if not args.quiet:
        size = sum(plan.nbytes for plan in built) / MEGA
        where = directory / "tensorrt"
        console.say(f"built {len(built)} plans in {where} ({size:.1f} MB) and kernels in {kernels}")


def _summary(manifest: Manifest, directory: Path) -> str:
    """Return one line about a new engine: precisions, tile, experts, size and the largest error."""
    arrangements = [a for graph in manifest.graphs.values() for a in graph.arrangements]
    proofs = [a.parity.relative_l2 for a in arrangements if a.parity]
    precisions = dict.fromkeys(a.precision for a in arrangements)
    size = sum((directory / file.file).stat().st_size for file in manifest.files)
    experts = f"{len(manifest.experts)} experts, " if manifest.experts else ""
    return (
        f"{manifest.name}, {' and '.join(precisions)}, tile {manifest.tile} px, "
        f"{experts}{size / MEGA:.1f} MB; "
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
        metavar="PATH",
        help="engine directory (default: ./NAME-PRECISION), or with --single the file",
    )
    add(
        "--target",
        choices=["cpu", "gpu", "both"],
        help="the device that the graphs are arranged for; all but bf16 graphs run on either, and with both "
        "the engine holds a second file of each graph (default: cpu, or gpu with --single)",
    )
    add("--tile", type=int, metavar="PX", help="side of a tile in output pixels (default: as trained)")
    add(
        "--reuse",
        type=int,
        nargs="?",
        const=SHALLOW_BLOCKS,
        metavar="BLOCKS",
        help="add shallow graphs of the last BLOCKS output blocks, which moesr-run --reuse N runs between "
        f"full steps (default: none; without a number the last {SHALLOW_BLOCKS})",
    )
    add(
        "--polygraphy",
        action="store_true",
        help="also write the inputs of every graph and a data loader script to polygraphy/ in the engine "
        "directory, for debugging with `polygraphy run`",
    )
    add("--force", action="store_true", help="replace an existing engine directory or file")
    add("--quiet", action="store_true", help="print errors only")
    add("--debug", action="store_true", help="print the traceback of an internal error")
    _add_precision(p.add_argument_group("precision"))
    single.add_arguments(p.add_argument_group("one file for other runtimes"))
    _add_prompts(p.add_argument_group("prompts, for models with a text encoder"))
    _add_tensorrt(p.add_argument_group("TensorRT"))
    _add_push(p.add_argument_group("Hugging Face hub"))
    return p


def _add_precision(group: argparse._ArgumentGroup) -> None:
    """Add --fp16, --bf16, --int8 and their settings; float32 is the default."""
    group.set_defaults(precision="fp32")
    precisions = group.add_mutually_exclusive_group()
    for name, text in {
        "fp16": "half precision, with float32 where the model needs it; with --target both only for the "
        "graphs of the GPU",
        "bf16": "bfloat16 on CPUs that are faster with it (with OpenVINO, measured by moesr-run) and float32 "
        "on others, at half the size; for a GPU bfloat16 throughout (TensorRT, compute capability 8.0 on)",
        "int8": "8-bit integers in most layers, for CPUs: wide models run twice as fast at a quarter of the "
        "size; every expert is calibrated at its own timesteps",
    }.items():
        precisions.add_argument(f"--{name}", action="store_const", const=name, dest="precision", help=text)
    add = group.add_argument
    add(
        "--store",
        choices=["fp32", "fp16"],
        default="fp32",
        help="type of the weights in the files of float32 graphs: fp16 halves their size (default: fp32)",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="FOLDER",
        help="photographs to calibrate --int8 on (default for the demo models: some that come with "
        "scikit-image and other packages)",
    )
    add(
        "--photographs",
        type=_two_or_more,
        default=8,
        metavar="N",
        help="number of photographs for --int8; the last one proves the result (default: 8)",
    )
    add(
        "--int8-error",
        type=_positive,
        default=INT8_ERROR,
        metavar="E",
        help="relative error that --int8 may cause in the result of a graph; a larger one keeps fewer layers "
        "in float32, and 1 keeps none (default: %(default)g)",
    )


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--prompt",
        metavar="TEXT",
        help="describes the wanted image (default: the published prompt, which is empty without guidance)",
    )
    add(
        "--negative-prompt",
        metavar="TEXT",
        help="describes what guidance leads away from (default: the published one with --guidance)",
    )
    add(
        "--guidance",
        type=float,
        metavar="S",
        help="default strength of guidance; 1 is none, and larger values lead away from the negative prompt "
        f"(default: 1, or {GUIDANCE:g} with --negative-prompt)",
    )


def _add_tensorrt(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tensorrt",
        action="store_true",
        help="build TensorRT plans of the graphs for a GPU and compile our kernels; implies --target both",
    )
    add(
        "--capability",
        nargs="+",
        type=_capability,
        default=[],
        metavar="X.Y",
        help="compute capabilities to build for, such as 8.9; TensorRT for RTX needs no such GPU in this "
        "machine (default: the capability of the GPU in this machine)",
    )
    add(
        "--no-kernels",
        action="store_true",
        help="keep the decoder in one graph, without the operators that our kernels compute",
    )
    add(
        "--residuals",
        choices=["plans", "kernels", "estimated"],
        default="plans",
        help="compute the inverted residuals of the refinement network by TensorRT plans, by our kernel, or "
        "each by the faster of the two as estimated (default: plans)",
    )


def _add_push(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--push",
        metavar="OWNER/NAME",
        help="upload the engine and a model card to this repository of the Hugging Face hub, which is "
        "created if it is missing; CHECKPOINT may then be an engine directory, which is uploaded as it is",
    )
    add("--private", action="store_true", help="make a new repository private")
    add("--message", metavar="TEXT", help="message of the commit (default: name and precision of the engine)")


if __name__ == "__main__":
    sys.exit(main())
