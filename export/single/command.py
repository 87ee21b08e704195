"""The options of `moesr-export` for one file, and what the command does with them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moesr.runtime.errors import UsageError
from moesr.runtime.images.color import COLOR_FIXES
from moesr.runtime.options import DEFAULT_COLOR_FIX, DEFAULT_SEED
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.runtime.system import console

if TYPE_CHECKING:
    from moesr.export.options import ExportOptions
    from moesr.training.checkpoint import Checkpoint

MEGA = 1e6
OWN = ("steps", "sampler", "seed", "fidelity", "color_fix")
"""The options that need --single."""

ENGINE_ONLY = {
    "tensorrt": "plans are built from an engine directory; tools for TensorRT build their own from the file",
    "no_kernels": "the file holds standard operators only",
    "capability": "the file serves every GPU",
    "reuse": "the file holds full steps only",
    "polygraphy": "the inputs of a graph belong into an engine directory",
    "calibrate": "it belongs to --int8",
    "push": "an engine directory is what the hub's repositories hold",
}
"""Options that --single refuses, with the reason."""


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add --single and the options that need it."""
    add = group.add_argument
    add(
        "--single",
        action="store_true",
        help="write one ONNX file in place of an engine directory: RGB in [0, 1] to RGB in [0, 1], for ONNX "
        "Runtime, vs-mlrt, chaiNNer and ComfyUI's TensorRT upscaler; arranged for a GPU by default",
    )
    add(
        "--dynamic",
        action="store_true",
        help="accept LR images of every size that is a multiple of the model's (stated in the file's "
        "metadata), not only of one tile; needs more memory and time per pixel",
    )
    add("--steps", type=int, metavar="N", help="number of sampling steps in the file")
    add("--sampler", choices=list(SAMPLERS), help="sampler in the file (default: the model's own)")
    add("--seed", type=int, metavar="N", help=f"seed of the noise in the file (default: {DEFAULT_SEED})")
    add(
        "--fidelity",
        type=float,
        metavar="W",
        help="weight of the LR features in the decoder, 0 to 1 (default: the model's own)",
    )
    add(
        "--color-fix",
        choices=COLOR_FIXES,
        help=f"color correction towards the LR image in the file (default: {DEFAULT_COLOR_FIX})",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for options that need --single, or that cannot be used together with it."""
    if not args.single:
        for name in OWN:
            if getattr(args, name) is not None:
                raise UsageError(
                    f"{_flag(name)} belongs to --single; an engine directory takes it when it runs "
                    f"(moesr-run {_flag(name)})"
                )
        if args.dynamic:
            raise UsageError("--dynamic belongs to --single; moesr-run takes images of every size")
        return
    if args.steps is None:
        raise UsageError("--single unrolls the sampling steps: give their number, such as --steps 4")
    if args.precision in ("int8", "bf16"):
        raise UsageError(f"--single and --{args.precision} exclude each other; use --fp16 or float32")
    if args.target == "both":
        raise UsageError("--single writes one file: use --target cpu or --target gpu, or leave it out")
    for name, reason in ENGINE_ONLY.items():
        if getattr(args, name) not in (None, False, []):
            raise UsageError(f"--single and {_flag(name)} exclude each other: {reason}")
    if args.residuals != "plans":
        raise UsageError(f"--single and --residuals exclude each other: {ENGINE_ONLY['no_kernels']}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(args: argparse.Namespace, checkpoint: Checkpoint, options: ExportOptions) -> int:
    """Write the file that the arguments describe, and report it."""
    from moesr.export.single import write  # imported here so that --help does not load torch

    given = {name: getattr(args, name) for name in OWN if getattr(args, name) is not None}
    settings = write.RunOptions(**given, open_sizes=args.dynamic)
    path = args.output or Path(write.default_name(checkpoint.config, options, settings))
    with console.bar(args.quiet, total=len(write.STAGES), unit="stage") as bar:

        def on_stage(stage: str) -> None:
            bar.n = write.STAGES.index(stage)
            bar.set_description(stage)

        made = write.export_single(checkpoint, path, options, settings, force=args.force, on_stage=on_stage)
        bar.n = len(write.STAGES)
        bar.refresh()
    if not args.quiet:
        side, size = made.side, path.stat().st_size / MEGA
        error = max(made.latent.relative_l2, made.image.relative_l2)
        console.say(
            f"wrote {path} (input {side}x{side} px, x{made.scale}, {settings.steps} steps, {size:.1f} MB; "
            f"largest error {error:.1e} against the networks)"
        )
    return 0
