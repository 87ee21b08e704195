"""The command `moesr-train` after its arguments are parsed: run the stages in order, or measure one."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from moesr.runtime.errors import UsageError
from moesr.training.checkpoint import Checkpoint, load_checkpoint
from moesr.training.config import StableSRConfig, VaeConfig
from moesr.training.data.crops import Crops
from moesr.training.data.photographs import PhotoFolder, scan
from moesr.training.loop import distributed
from moesr.training.loop.allocator import keep_freed
from moesr.training.loop.dry_run import measure
from moesr.training.loop.fit import Run, Samples
from moesr.training.loop.metrics_log import summary_writer
from moesr.training.loop.out_of_memory import memory_relief
from moesr.training.loop.trainer import Objective
from moesr.training.recipe import Augmentation, Recipe, StageConfig, load_recipe
from moesr.training.stages import autoencoder, decoder, experts, latents, refinement, structure
from moesr.training.stages.common import CHECKPOINT, first_stage_of, with_lr

log = logging.getLogger("moesr")

ALL = ("autoencoder", "experts", "decoder")
ALL_STABLESR = ("structure", "decoder")
BEFORE = {"experts": "autoencoder", "latents": "experts", "decoder": "experts"}
BEFORE_STABLESR = {
    "structure": "moesr-import --stable-diffusion",
    "latents": "structure",
    "decoder": "structure",
}
ALL_AUTOENCODER = ("autoencoder", "refinement")
BEFORE_AUTOENCODER = {"refinement": "autoencoder or of moesr-import --decoder"}
# Options that only some stages accept.
OWN = {
    "expert": ("experts",),
    "init": ("experts", "structure", "decoder", "refinement"),
    "latents": ("decoder",),
}


def start(args: argparse.Namespace) -> int:
    """Check the arguments, join the other processes, and run the stage."""
    recipe = load_recipe(args.config, args.changes)
    for option, stages in OWN.items():
        if getattr(args, option) is not None and args.stage not in stages:
            raise UsageError(f"--{option}: is for {' and '.join(stages)} only, not for {args.stage}")
    stages, before = ALL, BEFORE
    if isinstance(recipe.model, StableSRConfig):
        stages, before = ALL_STABLESR, {**BEFORE_STABLESR, "all": BEFORE_STABLESR["structure"]}
    if isinstance(recipe.model, VaeConfig):
        stages, before = ALL_AUTOENCODER, BEFORE_AUTOENCODER
    latents_made = () if stages is ALL_AUTOENCODER else ("latents",)
    if args.stage not in (*stages, "all", *latents_made):
        raise UsageError(f"{args.stage}: {recipe.model.name} has none, its stages are {', '.join(stages)}")
    if args.stage in before and args.start is None:
        raise UsageError(
            f"{args.stage} builds on another stage: give --from with the checkpoint of {before[args.stage]}"
        )
    if args.data is None and args.latents is None:
        raise UsageError(f"{args.stage} needs photographs: give --data with their folder")
    if args.workers < 0 or args.threads < 0:
        raise UsageError("--workers and --threads: expected 0 or more")
    if args.tensorboard:
        summary_writer()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed()
    with distributed.processes(pick_device(args.device)) as device:
        if distributed.rank() > 0:
            log.setLevel(logging.ERROR)  # process 0 logs for all
        folders = [None if path is None else scan(path) for path in (args.data, args.val)]
        inputs = Inputs(args, recipe, device, *folders)
        (dry_run if args.dry_run else train)(inputs)
    return 0


def pick_device(name: str | None) -> str:
    """Return `name`, or without a name "cuda" if there is a GPU, else "cpu"; UsageError if it is unusable."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {name}: cannot be used ({reason}); expected cpu, cuda or cuda:N"
        ) from error
    return name


def stage_config(stage: str, recipe: Recipe) -> StageConfig:
    """Return the part of the recipe for this stage."""
    return recipe.decoder if stage in ("latents", "refinement") else getattr(recipe, stage)


@dataclass(frozen=True)
class Inputs:
    """The inputs that all stages of one command share."""

    args: argparse.Namespace
    recipe: Recipe
    device: torch.device
    data: PhotoFolder | None
    val: PhotoFolder | None

    def crops(self, folder: PhotoFolder | None, stage: str, augmentation: Augmentation) -> Crops | None:
        """Return the crops for `stage` from `folder`; None without a folder."""
        if folder is None:
            return None
        patch_px = stage_config(stage, self.recipe).patch_px
        return Crops(folder.at_least(patch_px), patch_px, self.recipe.seed, augmentation=augmentation)

    def run(self, directory: Path) -> Run:
        """Return the settings of a run in `directory`."""
        args = self.args
        return Run(directory, self.recipe.seed, self.device, args.workers, args.quiet, args.tensorboard)


def train(inputs: Inputs) -> None:
    """Run one stage, or all of them, to the end."""
    args = inputs.args
    before = load_checkpoint(args.start) if args.start else None
    if args.stage != "all":
        run_stage(args.stage, inputs, args.output, before)
        return
    stages = ALL
    if isinstance(inputs.recipe.model, StableSRConfig):
        stages = ALL_STABLESR
    elif isinstance(inputs.recipe.model, VaeConfig):
        stages = ALL_AUTOENCODER
    if before and stages is not ALL_STABLESR:
        stages = stages[1:]
    for stage in stages:
        directory = args.output / stage
        run_stage(stage, inputs, directory, before)
        before = load_checkpoint(directory / CHECKPOINT)


def run_stage(stage: str, inputs: Inputs, directory: Path, before: Checkpoint | None) -> None:
    """Run one stage in `directory`, starting from `before`, the checkpoint of the previous stage."""
    args, recipe, run = inputs.args, inputs.recipe, inputs.run(directory)
    data = inputs.crops(inputs.data, stage, recipe.augmentation)
    held_out = inputs.crops(inputs.val, stage, Augmentation())
    init = load_checkpoint(args.init) if args.init else None
    with memory_relief(stage, recipe):
        if stage == "decoder":
            assert before is not None
            return decoder.train(recipe, data, run, before, held_out, made=args.latents, init=init)
        assert data is not None
        if stage == "autoencoder":
            return autoencoder.train(recipe, data, run, held_out)
        assert before is not None
        if stage == "latents":
            return latents.make(recipe, before, data, run, directory, recipe.decoder.latents)
        if stage == "structure":
            return structure.train(recipe, data, run, before, held_out, init=init)
        if stage == "refinement":
            return refinement.train(recipe, data, run, before, held_out, init=init)
        return experts.train(recipe, data, run, before, held_out, expert=args.expert, init=init)


def dry_run(inputs: Inputs) -> None:
    """Measure three steps of the stage and print the result."""
    args, recipe = inputs.args, inputs.recipe
    if args.stage in ("latents", "all"):
        raise UsageError(
            f"--dry-run measures training steps, not those of {args.stage}; name a stage that trains: "
            "autoencoder, experts or decoder"
        )
    if args.data is None:
        raise UsageError("--dry-run measures training steps on --data, a folder of photographs")
    data = inputs.crops(inputs.data, args.stage, recipe.augmentation)
    assert data is not None
    run = inputs.run(args.output)
    before = load_checkpoint(args.start) if args.start else None
    with memory_relief(args.stage, recipe):
        objective, samples = measurable(args.stage, recipe, data, run, before)
        measured = measure(objective, stage_config(args.stage, recipe), samples, run)
    if distributed.rank() == 0:
        print(measured)


def measurable(
    stage: str, recipe: Recipe, data: Crops, run: Run, before: Checkpoint | None
) -> tuple[Objective, Samples]:
    """Return the stage's objective and samples of the same shapes as in training, without writing files."""
    if stage == "autoencoder":
        return autoencoder.prepare(recipe), data
    assert before is not None
    if stage == "refinement":
        return refinement.prepare(recipe, before, run), data
    samples = with_lr(data, recipe, run.device.type)
    if stage == "experts":
        return experts.prepare(recipe, first_stage_of(recipe, before, run)), samples
    if stage == "structure":
        return structure.prepare(recipe, before, run), samples
    model = recipe.model.decoder
    pairs = with_lr(data, recipe, "cpu")
    return decoder.prepare(recipe, before, run), decoder.StandIns(pairs, model.embed_dim, model.factor)
