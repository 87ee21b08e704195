"""From a checkpoint to one ONNX file: the graph is written, checked, proved, and published by a rename."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import onnx
import torch

from moesr.export import package
from moesr.export.graph_writer import OnStage
from moesr.export.graphs.builder import BuiltGraph, onnx_versions
from moesr.export.options import ExportOptions
from moesr.export.single import proof
from moesr.export.single.graph import Recipe, single_graph
from moesr.export.single.networks import family_of
from moesr.runtime.engine.graph_spec import Parity
from moesr.runtime.errors import OutputError, UsageError
from moesr.runtime.images.color import COLOR_FIXES
from moesr.runtime.options import DEFAULT_COLOR_FIX, DEFAULT_SEED, check_fidelity, check_seed, one_of, whole
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.runtime.system import files
from moesr.training.checkpoint import Checkpoint
from moesr.training.config import ModelConfig, StableSRConfig

MOST_BYTES = (1 << 31) - (1 << 20)
"""The largest ONNX file, a limit of Protocol Buffers; the tools read no weights from further files."""

SUFFIX = ".onnx"

STAGES = ("read", "write", "prove", "publish")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The settings of the run, which become constants of the file; None is the model's own choice.

    They mean what they mean for `moesr-run`.
    """

    steps: int
    sampler: str | None = None
    seed: int = DEFAULT_SEED
    fidelity: float | None = None
    color_fix: str = DEFAULT_COLOR_FIX
    open_sizes: bool = False  # LR images of every size that is a multiple of `input_multiple`


@dataclass(frozen=True)
class SingleFile:
    """A file that was written: its LR size in pixels, and the errors of its latent and its image."""

    path: Path
    side: int
    scale: int
    latent: Parity
    image: Parity


def default_name(config: ModelConfig, options: ExportOptions, run: RunOptions) -> str:
    """Return the name of the file if the user gives none."""
    return f"{config.name}-{run.steps}steps-{options.precision}{SUFFIX}"


@torch.inference_mode()
def export_single(
    checkpoint: Checkpoint,
    path: Path,
    options: ExportOptions,
    run: RunOptions,
    *,
    force: bool = False,
    on_stage: OnStage = lambda stage: None,
) -> SingleFile:
    """Write a checkpoint as one ONNX file for other runtimes, and prove it.

    `options` choose the tile, the prompts and one arrangement of the operators. `on_stage` is called with the
    name of each of STAGES when it begins. An existing file is refused unless `force`. Raises UsageError if
    the model does not support an option, ParityError if the file misses the networks' result, and OutputError
    if it cannot be written; after an error there is no new file.
    """
    package.check_model(checkpoint, options)
    if checkpoint.config.unet is None:
        raise UsageError(f"{checkpoint.directory}: has no sampler to unroll; export it without --single")
    check_output(path, force=force)
    config, (choices,) = checkpoint.config, options.lowerings().values()
    recipe = make_recipe(config, run)
    side, rest = divmod(package.tile_side(checkpoint, options), config.scale)
    if rest:
        raise UsageError(f"--tile: --single needs a side that is a multiple of the scale, {config.scale}")
    check_open(config, options, run)
    prompts = package.prompts_of(checkpoint, options.prompts)
    on_stage("read")
    family = family_of(checkpoint, prompts)
    on_stage("write")
    built, latent = single_graph(family, recipe, side, side, choices)
    facts = {"precision": choices.precision, "opset": onnx_versions(choices)[0], "input_px": side}
    facts |= {"input_multiple": input_multiple(config)} if run.open_sizes else {}
    _describe(built, checkpoint, recipe, facts)
    try:
        with files.new_file(path) as new:
            _save(new, built, path)
            del built
            on_stage("prove")
            errors = proof.prove(new, latent, family, recipe, side, side, choices)
            on_stage("publish")
    except OSError as error:
        raise OutputError(f"{path}: cannot write the file: {files.reason(error)}") from error
    return SingleFile(path, side, config.scale, *errors)


def check_open(config: ModelConfig, options: ExportOptions, run: RunOptions) -> None:
    """Raise UsageError if open sizes are asked for and cannot be had."""
    if run.open_sizes and isinstance(config, StableSRConfig):
        raise UsageError(
            f"{config.name}: --dynamic does not support StableSR; leave it out and choose --tile"
        )
    if run.open_sizes and options.target != "gpu":
        raise UsageError("--dynamic needs plain operators: use --target gpu, which also runs on CPUs")


def input_multiple(config: ModelConfig) -> int:
    """Return the number of LR pixels of which both sides of an input must be multiples."""
    return math.lcm(config.tile_multiple, config.scale) // config.scale


def check_output(path: Path, *, force: bool) -> None:
    """Raise UsageError for a wrong name, and OutputError if the file exists and may not be replaced."""
    if path.suffix != SUFFIX:
        raise UsageError(f"{path}: --single writes one file; give it a name that ends in {SUFFIX}")
    if files.examine(path, OutputError) is None:
        return
    if not path.is_file():
        raise OutputError(f"{path}: is not a file; choose another name")
    if not force:
        raise OutputError(f"{path}: exists; choose another name, or replace it with --force")


def make_recipe(config: ModelConfig, run: RunOptions) -> Recipe:
    """Fill in the model's choices and check all settings; UsageError names the wrong one."""
    steps = whole("steps", run.steps, 1, config.schedule.timesteps)
    sampler = one_of("sampler", config.sampler if run.sampler is None else run.sampler, SAMPLERS)
    return Recipe(
        table=SAMPLERS[sampler].table(config.schedule, steps, config.expert_ranges),
        sampler=sampler,
        seed=check_seed(run.seed),
        fidelity=check_fidelity(config.fidelity if run.fidelity is None else run.fidelity),
        color_fix=one_of("color_fix", run.color_fix, COLOR_FIXES),
        open_sizes=run.open_sizes,
    )


def _save(path: Path, built: BuiltGraph, shown: Path) -> None:
    """Write the file and check it; UsageError if it is too large for one file."""
    size = sum(len(tensor.raw_data) for tensor in built.model.graph.initializer)
    if size > MOST_BYTES:
        raise UsageError(
            f"{shown}: the weights take {size / 1e9:.1f} GB, and one ONNX file holds at most 2 GB; export "
            "with --fp16 or --store fp16, or export an engine directory (without --single)"
        )
    path.write_bytes(built.to_bytes())
    onnx.checker.check_model(str(path), full_check=True)


def _describe(built: BuiltGraph, checkpoint: Checkpoint, recipe: Recipe, more: Mapping[str, object]) -> None:
    """Write the facts that a user or a tool may look for into the file's metadata."""
    facts = {
        "name": checkpoint.config.name,
        "scale": checkpoint.config.scale,
        "steps": len(recipe.table),
        "sampler": recipe.sampler,
        "seed": recipe.seed,
        "fidelity": f"{recipe.fidelity:g}",
        "color_fix": recipe.color_fix,
        "checkpoint_sha256": checkpoint.sha256(),
        "version": metadata.version("moesr"),
        **more,
    }
    for key, value in facts.items():
        built.model.metadata_props.add(key=f"moesr.{key}", value=str(value))
