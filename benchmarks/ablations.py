"""Train small ablations of the papers' methods on top of a trained model, and compare them in one table.

RUN is the output of `moesr-train all --config demo-x4 --data DIR -o RUN`. The decoders are trained on its
experts and latents. The experts are trained on its first stage, all for the same number of steps, and decoded
by the full decoder of the same seed. Every model is trained once per seed, with other initial weights and
crops; the gain of a part of the method is compared with its variation between seeds. The same command
continues an interrupted run. The output directory gets ablations.md and the training runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import benchlib.missing_extra  # noqa: F401
import numpy as np
from benchlib import (
    image_pairs,
    metrics,
)
from benchlib.origin import origin_line
from benchlib.tables import Record, grid, means
from benchlib.training_runs import train_stage

from moesr.export.options import ExportOptions
from moesr.export.package import export_engine
from moesr.runtime.errors import MoesrError
from moesr.runtime.images.resize import imresize
from moesr.runtime.upscaler import Upscaler
from moesr.training.checkpoint import expert_count, load_checkpoint, save_checkpoint
from moesr.training.recipe import load_recipe
from moesr.training.stages.common import cpu_state

SCALE = 4
CLEAR = 2.0  # standard deviations from 0 at which a gain counts as clear
DEGRADATIONS = ("x4-bicubic", "x4-blind")
FULL = "ablation-decoder-aff-ffl"
DECODERS = {
    "baseline decoder": "ablation-decoder-baseline",
    "+ LR fusion, AFF": "ablation-decoder-aff",
    "+ FFL (full decoder)": FULL,
    "plain UNet for AFF, FFL": "ablation-decoder-unet-ffl",
}
EXPERTS = {
    "no sampling MoE": "ablation-no-sampling-moe",
    "no Space MoE": "ablation-no-space-moe",
    "all experts": "demo-x4",
}
GAINS = {
    "LR fusion and AFF": ("+ LR fusion, AFF", "baseline decoder"),
    "focal frequency loss": ("+ FFL (full decoder)", "+ LR fusion, AFF"),
    "AFF over a plain UNet": ("+ FFL (full decoder)", "plain UNet for AFF, FFL"),
    "sampling MoE": ("all experts", "no sampling MoE"),
    "Space MoE": ("all experts", "no Space MoE"),
}
"""For each part of the method, the model with it and the model without it."""

Runs = Mapping[int, Sequence[Record]]
"""For each seed, one record per method with its means over the photographs."""


@dataclass(frozen=True)
class Study:
    """The folders of the trained model, the photographs and the results, and settings of the training."""

    run: Path
    data: Path
    out: Path
    changes: tuple[str, ...]  # changes of every recipe, as --set takes them
    threads: int

    def decoder(self, preset: str) -> Path:
        """Train a decoder on the run's latents; returns the checkpoint of the whole model."""
        start = ["--from", self.run / "experts/checkpoint", "--latents", self.run / "decoder/latents"]
        return self._train("decoder", preset, *start)

    def experts(self, preset: str) -> Path:
        """Train experts on the run's first stage; returns the checkpoint of a model with the full decoder."""
        start = ["--from", self.run / "autoencoder/checkpoint", "--data", self.data]
        trained = load_checkpoint(self._train("experts", preset, *start))
        whole, place = load_checkpoint(self.out / FULL / "checkpoint"), self.out / preset / "whole"
        config = replace(trained.config, decoder=whole.config.decoder)
        states = (cpu_state(trained.expert(k)) for k in range(expert_count(config)))
        save_checkpoint(place, config, states, cpu_state(whole.decoder()), force=True)
        return place

    def _train(self, stage: str, preset: str, *options: object) -> Path:
        return train_stage(stage, preset, self.out / preset, self.changes, self.threads, *options)


def measure(models: Mapping[str, Path], args: argparse.Namespace) -> dict[str, list[Record]]:
    """Return mean scores of bicubic and of every model on the held-out photographs, by degradation."""
    hr = image_pairs.load_originals("demo")
    lr = {kind: {n: image_pairs.degrade(hr[n], kind, n) for n in hr} for kind in DEGRADATIONS}

    def scored(name: str, upscale: Callable[[np.ndarray], np.ndarray], kind: str) -> list[Record]:
        return [Record(n, name, metrics.scores(upscale(lr[kind][n]), hr[n], SCALE)) for n in hr]

    def enlarge(image: np.ndarray) -> np.ndarray:
        return imresize(image, *(side * SCALE for side in image.shape[:2]))

    records = {kind: scored("bicubic", enlarge, kind) for kind in DEGRADATIONS}
    for name, checkpoint in models.items():
        engine = checkpoint.parent / "engine"
        export_engine(load_checkpoint(checkpoint), engine, ExportOptions(tile_px=args.tile), force=True)
        with Upscaler(engine, threads=args.threads or None) as up:
            for kind in DEGRADATIONS:
                records[kind] += scored(name, partial(up, steps=args.steps), kind)
    return {kind: means(found) for kind, found in records.items()}


def train_all(study: Study) -> dict[str, Path]:
    """Train every model with one seed; returns their checkpoints by name."""
    models = {name: study.decoder(preset) for name, preset in DECODERS.items()}
    return models | {name: study.experts(preset) for name, preset in EXPERTS.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and write the table; returns the exit code."""
    args = parser().parse_args(argv)
    changes = (
        f"decoder.steps={args.decoder_steps}",
        f"experts.base_steps={args.base_steps}",
        f"experts.steps={args.expert_steps}",
    )
    found: dict[str, dict[int, list[Record]]] = {kind: {} for kind in DEGRADATIONS}
    try:
        for seed in args.seeds:
            place = args.out / f"seed-{seed}"
            study = Study(args.run, args.data, place, (*changes, f"seed={seed}"), args.threads)
            for kind, records in measure(train_all(study), args).items():
                found[kind][seed] = records
    except MoesrError as error:
        print(f"ablations: {error}", file=sys.stderr)
        return error.exit_code
    page = "\n".join([heading(args), *(section(kind, runs) for kind, runs in found.items())])
    (args.out / "ablations.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def section(kind: str, runs: Runs) -> str:
    """Return the tables of one degradation: scores of the methods, and gains of the parts of the method."""
    head = ["", *metrics.COLUMNS.values()]
    methods = [r.method for r in next(iter(runs.values()))]
    scores = [[name, *(_spread(v) for v in _by_column(runs, name))] for name in methods]
    gains = [[name, *(_gain(a - b) for a, b in _pairs(runs, *two))] for name, two in GAINS.items()]
    return f"## {kind}\n\n{grid(head, scores)}\n\n{grid(['what it brings', *head[1:]], gains)}\n"


def _by_column(runs: Runs, method: str) -> list[np.ndarray]:
    """Return the scores of a method by seed, one array [seeds] per measure."""
    own = [next(r for r in records if r.method == method).values for records in runs.values()]
    return [np.array([values[column] for values in own]) for column in metrics.COLUMNS]


def _pairs(runs: Runs, method: str, without: str) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    return zip(_by_column(runs, method), _by_column(runs, without), strict=True)


def _spread(values: np.ndarray, sign: str = "") -> str:
    """Format the mean and the standard deviation over the seeds."""
    deviation = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.3f}{deviation}"


def _gain(differences: np.ndarray) -> str:
    """Format the differences of two models over the seeds, bold if the gain is clear."""
    told = _spread(differences, "+")
    is_clear = len(differences) > 1 and abs(differences.mean()) > CLEAR * differences.std(ddof=1)
    return f"**{told}**" if is_clear else told


def heading(args: argparse.Namespace) -> str:
    """Return the Markdown text above the tables: settings, origin and how to read them."""
    batch = load_recipe("demo-x4").decoder
    return (
        "# Ablations, small scale\n\n"
        f"{origin_line()}\n\n"
        f"Decoders: {args.decoder_steps} steps of {batch.batch} crops of {batch.patch_px} px, on the same "
        f"latents. Experts: a base of {args.base_steps} steps, then {args.expert_steps} steps an expert, all "
        f"decoded by the full decoder. Means over three photographs kept out of training, {args.steps} "
        f"sampling steps, AdaIN; mean and standard deviation over {len(args.seeds)} seeds. "
        f"What a part brings is taken seed by seed, and bold where its mean is more than {CLEAR:g} standard "
        "deviations from 0: the others cannot be told from chance here.\n"
    )


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--run", type=Path, required=True, metavar="RUN", help="a trained model with all its stages")
    add("--data", type=Path, required=True, metavar="DIR", help="the photographs that it was trained on")
    add("--decoder-steps", type=int, default=400, help="(default: %(default)s)")
    add("--base-steps", type=int, default=400, help="(default: %(default)s)")
    add("--expert-steps", type=int, default=50, help="(default: %(default)s)")
    add("--steps", type=int, default=20, help="sampling steps (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--threads", type=int, default=0, help="CPU threads; 0: all cores (default)")
    add("--tile", type=int, default=192, metavar="PX", help="tile of the engines (default: %(default)s)")
    add(
        "-o", "--out", type=Path, default=Path("runs/ablations"), metavar="DIR", help="(default: %(default)s)"
    )
    return p


if __name__ == "__main__":
    sys.exit(main())
