"""Train plain latent diffusion and MoE-SR equally on one first stage, and compare them in tables.

FIRST is a checkpoint of `moesr-train autoencoder --config demo-next-x4`. On it the presets demo-ldm-x4 and
demo-next-x4 are trained: the only expert of latent diffusion for as many steps as MoE-SR's base and experts
together, and both decoders for the same number of steps on latents of their own experts. By default these are
the presets' numbers of steps, which take hours. --ldm and --moe name models that are trained already. The
same command continues an interrupted run. The output directory gets baseline.md, the training runs and the
engines.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import benchlib.missing_extra  # noqa: F401
import numpy as np
import torch
from benchlib import image_pairs, metrics
from benchlib.origin import origin_line
from benchlib.program import print_page
from benchlib.tables import HEADINGS, Record, grid, means
from benchlib.training_runs import train_stage
from flops import engine_row

from moesr.export.options import ExportOptions
from moesr.export.package import export_engine
from moesr.runtime.errors import UsageError
from moesr.runtime.images.resize import imresize
from moesr.runtime.loop.settings import takes_fidelity
from moesr.runtime.upscaler import Upscaler
from moesr.training.checkpoint import load_checkpoint
from moesr.training.recipe import load_recipe

LDM, MOE = "LDM", "MoE-SR"
PRESETS = {LDM: "demo-ldm-x4", MOE: "demo-next-x4"}
FIRST_DECODER = "LDM, decoder of the first stage"
DEGRADATIONS = ("x4-bicubic", "x4-mild")  # those of the presets
SEEDS = "seeds"
COLUMNS = (*metrics.COLUMNS, SEEDS)
WARMUP_SHARE = 10  # a short training warms up for at most one step in so many
HALF_PRECISION = 1e-3  # the error of codes that were stored in half precision

Upscale = Callable[[np.ndarray, int], np.ndarray]  # uint8 LR [h, w, 3] and seed -> uint8 SR [H, W, 3]


@dataclass(frozen=True)
class Lengths:
    """The numbers of training steps, and of latents that the experts and each decoder are trained on."""

    base: int
    expert: int
    decoder: int
    latents: int | None  # None: as in the presets

    @property
    def all_experts(self) -> int:
        """The number of steps of all experts of MoE-SR and their base, which LDM's only expert has too."""
        return self.base + len(load_recipe(PRESETS[MOE]).model.expert_ranges) * self.expert

    def changes(self, name: str) -> list[str]:
        """Return the changes of the preset of LDM or MoE-SR, as `--set` takes them."""
        recipe = load_recipe(PRESETS[name])
        base, steps = (0, self.all_experts) if name == LDM else (self.base, self.expert)
        found = {
            "experts.base_steps": base,
            "experts.steps": steps,
            "experts.warmup_steps": min(recipe.experts.warmup_steps, max(base, steps) // WARMUP_SHARE),
            "decoder.steps": self.decoder,
            "decoder.warmup_steps": min(recipe.decoder.warmup_steps, self.decoder // WARMUP_SHARE),
        }
        if self.latents is not None:
            found |= {"experts.latent_pool": self.latents, "decoder.latents": self.latents}
        return [f"{key}={value}" for key, value in found.items()]


def usual_lengths() -> Lengths:
    """Return the lengths of MoE-SR's preset."""
    recipe = load_recipe(PRESETS[MOE])
    return Lengths(recipe.experts.base_steps, recipe.experts.steps, recipe.decoder.steps, None)


def lengths(args: argparse.Namespace) -> Lengths:
    """Return the lengths that the arguments ask for; those of MoE-SR's preset by default."""
    asked = {"base": args.base_steps, "expert": args.expert_steps, "decoder": args.decoder_steps}
    given = {name: steps for name, steps in asked.items() if steps is not None}
    return replace(usual_lengths(), **given, latents=args.latents)


def run_of(name: str, args: argparse.Namespace) -> Path:
    """Return the directory of the training runs of LDM or MoE-SR."""
    return args.out / name.lower()


def train(name: str, args: argparse.Namespace) -> Path:
    """Train the experts and the decoder of LDM or MoE-SR; returns the checkpoint of the whole model."""
    if args.first_stage is None or args.data is None:
        raise UsageError(f"{name} is to be trained: give --first-stage and --data, or its finished model")
    preset, place = PRESETS[name], run_of(name, args)
    changes = [*lengths(args).changes(name), f"seed={args.seed}"]
    told = changes, args.threads, "--data", args.data
    start = train_stage("experts", preset, place / "experts", *told, "--from", args.first_stage)
    return train_stage("decoder", preset, place / "decoder", *told, "--from", start)


def check_first_stage(models: Mapping[str, Path]) -> None:
    """Raise UsageError unless all models decode the codes of one first stage."""
    codes = {name: load_checkpoint(path).decoder().quantize.embedding.weight for name, path in models.items()}
    (first, expected), *others = codes.items()
    for name, found in others:
        alike = found.shape == expected.shape
        if not (alike and torch.allclose(found, expected, rtol=HALF_PRECISION, atol=HALF_PRECISION)):
            raise UsageError(
                f"{models[first]} and {models[name]}: were trained on different first stages, so they cannot "
                "be compared at equal training; train them on one autoencoder"
            )


def upscalers(engine: Upscaler, name: str) -> dict[str, Upscale]:
    """Return the rows of one engine: its defaults, and if it takes a fidelity, the lowest one too."""
    m = engine.manifest
    if not takes_fidelity(m):
        return {name: lambda lr, seed: engine(lr, seed=seed)}

    def at(fidelity: float) -> Upscale:
        return lambda lr, seed: engine(lr, seed=seed, fidelity=fidelity)

    return {f"{name}, fidelity {w:g}": at(w) for w in dict.fromkeys((m.fidelity, 0.0))}


def enlarge(lr: np.ndarray, seed: int) -> np.ndarray:
    """Enlarge by bicubic interpolation, whatever the seed."""
    scale = image_pairs.DEGRADATIONS[DEGRADATIONS[0]]
    return imresize(lr, *(side * scale for side in lr.shape[:2]))


def score(name: str, upscale: Upscale, source: str, kind: str, seed: int) -> list[Record]:
    """Score one row of the table on every image."""
    records, scale = [], image_pairs.DEGRADATIONS[kind]
    for image, hr in image_pairs.load_originals(source).items():
        lr = image_pairs.degrade(hr, kind, image)
        sr, again = upscale(lr, seed), upscale(lr, seed + 1)
        planes = (metrics.measured_luma(result, scale) for result in (sr, again))
        records.append(Record(image, name, metrics.scores(sr, hr, scale) | {SEEDS: metrics.psnr(*planes)}))
    return records


def measure(models: Mapping[str, Path], args: argparse.Namespace) -> tuple[dict[str, list[Record]], str]:
    """Export every model and score it; returns the means by degradation, and the table of costs."""
    found = {kind: score("Bicubic", enlarge, args.hr, kind, args.seed) for kind in DEGRADATIONS}
    costs = []
    for number, (name, checkpoint) in enumerate(models.items()):
        engine = args.out / f"engine-{number}"
        export_engine(load_checkpoint(checkpoint), engine, ExportOptions(tile_px=args.tile), force=True)
        with Upscaler(engine, threads=args.threads or None) as up:
            cost = engine_row(engine, up.manifest.steps)
            sizes = f"{cost.params_m:.2f}", f"{1e3 * cost.step_t:.2f}", f"{1e3 * cost.total_t:.1f}"
            costs.append([name, *sizes, str(cost.steps)])
            for row, upscale in upscalers(up, name).items():
                for kind, records in found.items():
                    records += score(row, upscale, args.hr, kind, args.seed)
    head = ["", "parameters (M)", "a step (G MAC)", "an image (G MAC)", "steps"]
    return {kind: means(records) for kind, records in found.items()}, grid(head, costs)


def preamble(args: argparse.Namespace) -> str:
    """Return the text above the tables: settings, origin, and what the numbers can show."""
    shown = "three photographs kept out of training" if args.hr == "demo" else args.hr
    given = [f"{name} {path}" for name, path in ((LDM, args.ldm), (MOE, args.moe)) if path is not None]
    paragraphs = [
        "# Plain latent diffusion beside MoE-SR, at equal training",
        origin_line(),
        "Both models have the same first stage, width of the UNet, schedule and sampler. LDM has one expert "
        "without Space MoE, and its decoder is that of the first stage, without LR fusion and refinement "
        "network. The demo models' first stage adds its result to the enlarged LR image, so both see that "
        "image." + (f" Trained before: {', '.join(given)}." if given else ""),
        *(training(args) if len(given) < len(PRESETS) else []),
        f"Seed {args.seed}. Means over {shown}. HF is above the LR image's Nyquist frequency; two seeds: "
        "PSNR between the results of two seeds.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def training(args: argparse.Namespace) -> list[str]:
    """Describe the training in one paragraph, and if it is shorter than the presets', warn in another."""
    told, usual, recipe = lengths(args), usual_lengths(), load_recipe(PRESETS[MOE])
    experts = len(recipe.model.expert_ranges)
    pool, triples = (
        each if told.latents is None else told.latents
        for each in (recipe.experts.latent_pool, recipe.decoder.latents)
    )
    text = (
        f"Experts: {told.all_experts} steps of {recipe.experts.batch} crops for LDM, a base of {told.base} "
        f"and {experts} x {told.expert} for MoE-SR, from {pool} crops. Decoders: {told.decoder} steps of "
        f"{recipe.decoder.batch} crops, from {triples}."
    )
    if told.all_experts >= usual.all_experts and told.decoder >= usual.decoder:
        return [text]
    warning = (
        f"**This training is short: the experts had {told.all_experts} of the recipe's {usual.all_experts} "
        f"steps ({told.all_experts / usual.all_experts:.1%}), the decoders {told.decoder} of {usual.decoder} "
        f"({told.decoder / usual.decoder:.1%}).** The tables show that one command trains, exports and "
        "measures both models. They do not show which of them is better: the order of models that have "
        "learned so little says nothing about the order after the whole training."
    )
    return [text, warning]


def page(args: argparse.Namespace) -> str:
    """Train what is not trained yet, measure everything, and write the page."""
    models = {name: getattr(args, given) or train(name, args) for name, given in ((LDM, "ldm"), (MOE, "moe"))}
    check_first_stage(models)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.ldm is None:  # as in the literature, where only MoE-SR trains its decoder on sampled latents
        models = {FIRST_DECODER: run_of(LDM, args) / "experts/checkpoint", **models}
    found, costs = measure(models, args)
    tables = [
        f"## {kind}\n\n{grid(['', *(HEADINGS[c] for c in COLUMNS)], _rows(records))}\n"
        for kind, records in found.items()
    ]
    text = "\n".join([preamble(args), *tables, f"## Cost of one tile of {args.tile} px\n\n{costs}\n"])
    (args.out / "baseline.md").write_text(text, encoding="utf-8")
    return text


def _rows(records: Sequence[Record]) -> list[list[str]]:
    return [[r.method, *(_cell(c, r.values[c]) for c in COLUMNS)] for r in records]


def _cell(column: str, value: float) -> str:
    """Format one score; two equal results, of bicubic interpolation for example, have no PSNR."""
    decimals = 3 if column in ("ssim", "spectrum", "high_spectrum", "gms") else 2
    return f"{value:.{decimals}f}" if math.isfinite(value) else "-"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, usual = p.add_argument, "(default: the preset's)"
    add("--first-stage", type=Path, metavar="FIRST", help="checkpoint of moesr-train autoencoder")
    add("--data", type=Path, metavar="DIR", help="the photographs to train on")
    add("--ldm", type=Path, metavar="DIR", help="checkpoint of a trained model of demo-ldm-x4")
    add("--moe", type=Path, metavar="DIR", help="checkpoint of a trained model of demo-next-x4")
    add("--base-steps", type=int, metavar="N", help=f"steps of MoE-SR's base {usual}")
    add("--expert-steps", type=int, metavar="N", help=f"steps per expert of MoE-SR {usual}")
    add("--decoder-steps", type=int, metavar="N", help=f"steps of each decoder {usual}")
    add("--latents", type=int, metavar="N", help=f"crops of the experts, and of each decoder {usual}")
    add("--seed", type=int, default=0, help="of training and sampling (default: %(default)s)")
    add("--hr", default="demo", metavar="DIR", help="originals (default: three photographs)")
    add("--threads", type=int, default=0, help="CPU threads; 0: all cores (default)")
    add("--tile", type=int, default=192, metavar="PX", help="tile of the engines (default: %(default)s)")
    add("-o", "--out", type=Path, default=Path("runs/baseline"), metavar="DIR", help="(default: %(default)s)")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and write the page; returns the exit code."""
    return print_page(page, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
