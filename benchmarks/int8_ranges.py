"""Compare calibrations of int8: an expert's own timesteps or all timesteps, and percentiles as range limits.

Ranges are measured on photographs that come with Python packages, and errors (relative L2 to float32) on
other photographs (--hr): for one run of every expert at its own timesteps, and for the sampled image. Unless
a column says otherwise, every layer that can be int8 is int8, including sensitive ones. The output is
Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import benchlib.missing_extra  # noqa: F401
import numpy as np
import torch
from benchlib import (
    image_pairs,
    metrics,
)
from benchlib.origin import origin_line

from moesr.export.graphs.builder import BuiltGraph
from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.expert import expert_graph
from moesr.export.lowering import INT8_ERROR, Lowering, lowering
from moesr.export.package import checkpoint_directory
from moesr.export.parity import outputs
from moesr.export.quantisation import calibration, int8
from moesr.export.quantisation.calibration import Inputs, Recording
from moesr.export.quantisation.qdq import Ranges, layers_of, quantised
from moesr.runtime.system.relative_error import relative_l2
from moesr.training.checkpoint import Checkpoint, load_checkpoint
from moesr.training.config import ModelConfig

INT8 = lowering("cpu", "int8")
PERCENTILES = (99.9, 99.99, 99.999, 100.0)


@dataclass(frozen=True)
class Study:
    """A model, and the recorded inputs of its graphs for the photographs of calibration and measurement."""

    checkpoint: Checkpoint
    latent_px: int
    seen: Recording
    held_out: Recording

    @property
    def experts(self) -> list[str]:
        """The roles of the experts."""
        return [f"expert_{k}" for k in range(len(self.checkpoint.config.expert_ranges))]

    def graph(self, role: str, side: int | None = None, choices: Lowering = INT8) -> BuiltGraph:
        """Build the graph of a role, for latents of the tile's side or another side."""
        with torch.inference_mode():
            if role in self.experts:
                return expert_graph(self.checkpoint.expert(int(role[7:])), side or self.latent_px, choices)
            return decoder_graph(self.checkpoint.decoder(), side or self.latent_px, choices)

    def pooled(self, role: str) -> list[Inputs]:
        """Return as many inputs as the expert's own, taken from all timesteps."""
        everything = [given for each in self.experts for given in self.seen.inputs[each]]
        return calibration.spread(everything, len(self.seen.inputs[role]))

    def error(self, built: BuiltGraph, role: str, like: BuiltGraph) -> float:
        """Return the relative L2 error of a graph against another on the held-out photographs."""
        got, want = (
            np.stack([outputs(graph.to_bytes(), given)[0] for given in self.held_out.inputs[role]])
            for graph in (built, like)
        )
        return relative_l2(got, want)


@dataclass(frozen=True)
class Networks:
    """Graphs that replace a checkpoint's experts in the sampler."""

    config: ModelConfig
    graphs: Sequence[BuiltGraph]

    def expert(self, k: int) -> Callable[..., torch.Tensor]:
        """Return a function that runs graph k."""
        session = int8.open_model(self.graphs[k].model)

        def run(*given: torch.Tensor) -> torch.Tensor:
            names = [spec.name for spec in self.graphs[k].boundary.inputs]
            fed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
            return torch.from_numpy(np.asarray(session.run(None, fed)[0]))

        return run


def timesteps(study: Study) -> tuple[str, dict[str, list[BuiltGraph]]]:
    """Return a table that compares own timesteps with all timesteps, and the int8 graphs of both kinds."""
    lines = [
        "| expert | width of ranges, own : all | error, own | all | int8 within the budget, own | all |",
        "| --- " * 6 + "|",
    ]
    graphs: dict[str, list[BuiltGraph]] = {"own": [], "all": []}
    for role in study.experts:
        built = study.graph(role)
        layers = layers_of(built)
        found = {
            "own": int8.observe(built, layers, study.seen.inputs[role]),
            "all": int8.observe(built, layers, study.pooled(role)),
        }
        cells = []
        for kind, ranges in found.items():
            graphs[kind].append(quantised(built, layers, ranges))
            cells.append(f"{study.error(graphs[kind][-1], role, built):.4f}")
        shares = [f"{within_budget(study, role, ranges):.0%}" for ranges in found.values()]
        ratio = np.median([width(a) / width(b) for a, b in zip(*map(flat, found.values()), strict=True)])
        lines.append(f"| {role} | {ratio:.2f} | " + " | ".join([*cells, *shares]) + " |")
    return "\n".join(lines), graphs


def flat(ranges: Ranges) -> list[tuple[float, float]]:
    """Return the ranges of inputs and outputs in one list."""
    return [held for pair in ranges for held in pair]


def width(held: tuple[float, float]) -> float:
    """Return the width of a range."""
    return held[1] - held[0]


def within_budget(study: Study, role: str, ranges: Ranges) -> float:
    """Return the fraction of multiply-accumulates that may be int8 within the export's error budget."""
    side = min(study.latent_px, int8.SMALL_PX)
    small, whole = study.graph(role, side), study.graph(role)
    given = calibration.spread(study.seen.inputs[role], int8.TRIALS)
    trials = [int8.middle(each, side, study.latent_px) for each in given]
    errors = int8.sensitivities(small, layers_of(small), ranges, trials)
    layers = layers_of(whole)
    kept = int8.to_keep(errors, [layer.macs for layer in layers], INT8_ERROR)
    return sum(layer.macs for i, layer in enumerate(layers) if i not in kept) / whole.macs


def methods(study: Study) -> str:
    """Return a table of errors by the percentile at which ranges end."""
    roles = [*study.experts, "decoder"]
    lines = [f"| percentile | {' | '.join(roles)} |", "| --- " * (1 + len(roles)) + "|"]
    for percentile in PERCENTILES:
        cells = []
        for role in roles:
            built = study.graph(role)
            layers = layers_of(built)
            ranges = int8.observe(built, layers, study.seen.inputs[role], percentile)
            cells.append(f"{study.error(quantised(built, layers, ranges), role, built):.4f}")
        lines.append(f"| {percentile:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sampled(
    study: Study, graphs: dict[str, list[BuiltGraph]], images: Sequence[np.ndarray], tile: int
) -> str:
    """Return a table of sampled images, decoded in float32: PSNR to the originals and to float32's result."""
    decoder, exact = study.graph("decoder"), None
    lines = ["| experts | PSNR (dB) | to float32 (dB) |", "| --- | --- | --- |"]
    kinds = {"float32": [study.graph(role) for role in study.experts]} | graphs
    for kind, experts in kinds.items():
        networks = Networks(study.checkpoint.config, experts)
        recorded = calibration.record(networks, images, tile)  # type: ignore[arg-type]
        results = [to_pixels(outputs(decoder.to_bytes(), each)[0]) for each in recorded.inputs["decoder"]]
        exact = exact or results
        scale = study.checkpoint.config.scale
        scores = [metrics.scores(*cut(sr, hr), scale) for sr, hr in zip(results, images, strict=True)]
        quality = np.mean([score["psnr"] for score in scores])
        close = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(results, exact, strict=True)]
        nearness = "" if kind == "float32" else f"{10 * np.log10(255**2 / np.mean(close)):.1f}"
        lines.append(f"| {kind} | {quality:.2f} | {nearness} |")
    return "\n".join(lines)


def to_pixels(image: np.ndarray) -> np.ndarray:
    """Convert [1, 3, H, W] in [-1, 1] to uint8 [H, W, 3]."""
    return np.rint((np.clip(image[0], -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)


def cut(sr: np.ndarray, hr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a result and the corresponding middle of its original, in one size."""
    height, width = (min(a, b) for a, b in zip(sr.shape[:2], hr.shape[:2], strict=True))
    top, left = (hr.shape[0] - height) // 2, (hr.shape[1] - width) // 2
    return sr[:height, :width], hr[top : top + height, left : left + width]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of all models."""
    args = parser().parse_args(argv)
    print(f"# int8 by its calibration\n\n{origin_line()}")
    for name in args.models:
        checkpoint = load_checkpoint(checkpoint_directory(Path(name)))
        images = list(image_pairs.load_originals(args.hr).values())
        record = partial(calibration.record, checkpoint, tile_px=args.tile)
        seen, held_out = record(calibration.demo_photographs(args.photographs)), record(images)
        study = Study(checkpoint, args.tile // checkpoint.config.decoder.factor, seen, held_out)
        table, graphs = timesteps(study)
        print(f"\n## {checkpoint.config.name}, tile {args.tile} px, {seen.steps} steps\n")
        print(f"Ranges of an expert's own timesteps, {seen.images} photographs, and of all:\n\n{table}\n")
        print(f"Images sampled by int8 experts:\n\n{sampled(study, graphs, images, args.tile)}\n")
        print(f"Percentile at which a range ends, own timesteps:\n\n{methods(study)}", flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--models", nargs="+", default=["demo-x4", "demo-x8"], help="checkpoints (default: both demo models)")
    add("--hr", default="demo", metavar="DIR", help="photographs to measure on (default: demo)")
    add("--photographs", type=int, default=8, metavar="N", help="photographs to calibrate on (default: 8)")
    add("--tile", type=int, default=192, metavar="PX", help="side of a tile (default: 192)")
    return p


if __name__ == "__main__":
    sys.exit(main())
