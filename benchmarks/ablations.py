"""Train the ablations of the papers small, on top of a trained model, and compare them in one table.

RUN is what `moesr-train all --config demo-x4 --data DIR -o RUN` wrote. The decoders start from its experts
and latents; the experts start from its first stage, train for as many steps as each other, and are decoded
by the full decoder of these. Run again, it continues. The output directory gets ablations.md and each
model's training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import metrics
import numpy as np
import pairs
from machine import machine_line
from tables import Record, markdown, means

from moesr.export.package import export_engine
from moesr.runtime.errors import MoesrError
from moesr.runtime.resize import imresize
from moesr.runtime.upscaler import Upscaler
from moesr.training.checkpoint import expert_count, load_checkpoint, save_checkpoint
from moesr.training.cli import main as train
from moesr.training.recipe import load_recipe
from moesr.training.stages.common import cpu_state

SCALE = 4
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


@dataclass(frozen=True)
class Study:
    """Where the trained model, the photographs and the results are, and how long to train."""

    run: Path
    data: Path
    out: Path
    changes: tuple[str, ...]  # of every recipe, as --set takes them

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
        directory = self.out / preset
        changes = [word for change in self.changes for word in ("--set", change)]
        code = train([stage, "--config", preset, "-o", str(directory), *changes, *map(str, options)])
        if code:
            raise SystemExit(code)
        return directory / "checkpoint"


def measure(models: Mapping[str, Path], args: argparse.Namespace) -> dict[str, list[Record]]:
    """Scores of bicubic and of every model, on the photographs kept out of training, by degradation."""
    hr = pairs.load_originals("demo")
    lr = {kind: {n: pairs.degrade(hr[n], kind, n) for n in hr} for kind in DEGRADATIONS}

    def scored(name: str, upscale: Callable[[np.ndarray], np.ndarray], kind: str) -> list[Record]:
        return [Record(n, name, metrics.scores(upscale(lr[kind][n]), hr[n], SCALE)) for n in hr]

    def enlarge(image: np.ndarray) -> np.ndarray:
        return imresize(image, *(side * SCALE for side in image.shape[:2]))

    records = {kind: scored("bicubic", enlarge, kind) for kind in DEGRADATIONS}
    for name, checkpoint in models.items():
        engine = checkpoint.parent / "engine"
        export_engine(load_checkpoint(checkpoint), engine, tile_px=args.tile, force=True)
        with Upscaler(engine) as up:
            for kind in DEGRADATIONS:
                records[kind] += scored(name, partial(up, steps=args.steps), kind)
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, write the table; returns the exit code."""
    args = parser().parse_args(argv)
    changes = (
        f"decoder.steps={args.decoder_steps}",
        f"experts.base_steps={args.base_steps}",
        f"experts.steps={args.expert_steps}",
    )
    study = Study(args.run, args.data, args.out, changes)
    try:
        models = {name: study.decoder(preset) for name, preset in DECODERS.items()}
        models |= {name: study.experts(preset) for name, preset in EXPERTS.items()}
        records = measure(models, args)
    except MoesrError as error:
        print(f"ablations: {error}", file=sys.stderr)
        return error.exit_code
    tables = [f"## {kind}\n\n{markdown(found, means(found))}" for kind, found in records.items()]
    page = "\n".join([heading(args), *tables])
    (args.out / "ablations.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def heading(args: argparse.Namespace) -> str:
    """Markdown above the tables: what was trained, and where."""
    batch = load_recipe("demo-x4").decoder
    return (
        "# Ablations, small scale\n\n"
        f"Machine: {machine_line()}.\n\n"
        f"Decoders: {args.decoder_steps} steps of {batch.batch} crops of {batch.patch_px} px, on the same "
        f"latents. Experts: a base of {args.base_steps} steps, then {args.expert_steps} steps an expert, all "
        "decoded by the full decoder. Means over three photographs kept out of training, "
        f"{args.steps} sampling steps, AdaIN. Runs this short rank the variants only roughly.\n"
    )


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--run", type=Path, required=True, metavar="RUN", help="a trained model with all its stages")
    add("--data", type=Path, required=True, metavar="DIR", help="the photographs that it was trained on")
    add("--decoder-steps", type=int, default=200, help="(default: %(default)s)")
    add("--base-steps", type=int, default=400, help="(default: %(default)s)")
    add("--expert-steps", type=int, default=50, help="(default: %(default)s)")
    add("--steps", type=int, default=20, help="of sampling (default: %(default)s)")
    add("--tile", type=int, default=192, metavar="PX", help="of the engines (default: %(default)s)")
    add(
        "-o", "--out", type=Path, default=Path("runs/ablations"), metavar="DIR", help="(default: %(default)s)"
    )
    return p


if __name__ == "__main__":
    sys.exit(main())
