"""Time every way to make an image on this machine, from eager PyTorch up: an optimisation ladder.

Networks of the published shapes with random weights are exported, and the export compares the graphs with the
networks before anything is timed. The configurations (rungs, in `ladder/configurations.py`) then alternate in
rounds, each in a new process, since memory cannot hold all of them. A process runs a step and a decode of one
tile, and then times three steps and a decode. The time of an image of N steps is the sum of the medians of N
steps and a decode; with reuse of features, of the full and shallow steps that four experts would run. The
time of a first image is the sum of loading, the first runs and the remaining steps. For engines, peak memory
is that of a process that opens the engine and makes an image of two steps (all experts have the same size);
otherwise it is that of the timed process. Quality is the error of a step and of a decode relative to eager
PyTorch in float32 on the same inputs, and, with --demo, the PSNR of the bundled x4 model on held-out
photographs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchlib.missing_extra  # noqa: F401
import numpy as np
import torch
from benchlib.machine import load_average, machine, machine_line, usable_cores
from benchlib.origin import origin_line, work_folder
from ladder import peak_rates, report
from ladder.configurations import EAGER, RUNGS, Rung, obstacle
from ladder.rounds import Bench
from torch import nn
from tqdm import tqdm

from moesr.export import parity
from moesr.export.package import check_tile
from moesr.runtime.errors import MoesrError
from moesr.training.checkpoint import CONFIG_NAME, Checkpoint, load_checkpoint, save_checkpoint
from moesr.training.config import AutoencoderConfig, ModelConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet

QUICK = {"width": 32, "channels": 32, "tile": 64}
"""Sizes with --quick, for tests of this program."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the page and optionally write it; returns 0 or the exit code of the error."""
    args = parser().parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    config = ModelConfig(
        name="latency",
        unet=UNetConfig(width=args.width, space_experts=1),
        decoder=AutoencoderConfig(channels=args.channels),
        expert_ranges=((0, 1000),),
    )
    try:
        check_tile(config, args.tile)
        with tempfile.TemporaryDirectory(prefix="moesr-latency-") as scratch:
            sizes = {name: getattr(args, name) for name in QUICK}
            place = work_folder(args.work or Path(scratch), **sizes)
            place.mkdir(parents=True, exist_ok=True)
            result = measure(config, place, args)
    except MoesrError as error:
        print(f"latency: {error}", file=sys.stderr)
        return error.exit_code
    text = report.markdown(result)
    print(json.dumps(result, indent=1) if args.json else text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n", encoding="utf-8")
    return 0


def measure(config: ModelConfig, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Export, check, time and profile; returns JSON values."""
    print(machine_line(), file=sys.stderr)
    load, chosen = load_average(), _chosen(args.rungs)
    skipped = {rung.name: why for rung in chosen if (why := obstacle(rung))}
    chosen = [rung for rung in chosen if rung.name not in skipped]
    with tqdm(unit="stage", file=sys.stderr, disable=None) as bar:
        bar.set_description("write a checkpoint with random weights")
        if not (place / "checkpoint" / CONFIG_NAME).is_file():
            save_random(place / "checkpoint", config)
        checkpoint = load_checkpoint(place / "checkpoint")
        given = save_inputs(place / "inputs.npz", checkpoint, args.tile)
        bench = Bench(place, given, args, bar)
        skipped |= bench.export_all(checkpoint, chosen)
        bench.stage("measure the limits of arithmetic")
        rates = peak_rates.measure(args.threads, 256 if args.quick else peak_rates.SIDE)
        found = bench.time_all([rung for rung in chosen if rung.name not in skipped])
        skipped |= bench.failed
        for one in found:
            bench.find_memory(one)
            if args.demo:
                bench.find_quality(one)
        where = bench.profiles(found)
    return {
        "machine": machine(),
        "origin": origin_line(),
        "load_average": load,
        "settings": {k: getattr(args, k) for k in ("width", "channels", "tile", "threads", "repeats")},
        "limits": rates,
        "rungs": [one.to_json() for one in found],
        "skipped": skipped,
        "macs": bench.macs,
        "parity": bench.parity,
        "where": where,
    }


def _chosen(names: Sequence[str] | None) -> list[Rung]:
    """Return the rungs whose names contain one of `names`, and always eager PyTorch."""
    wanted = [n.lower() for n in names or [""]]
    return [rung for rung in RUNGS if rung is EAGER or any(n in rung.name.lower() for n in wanted)]


def save_inputs(path: Path, checkpoint: Checkpoint, tile_px: int) -> Path:
    """Write the seeded inputs of the parity check for an expert and the decoder, one tile each."""
    latent_px = tile_px // checkpoint.config.decoder.factor
    expert = parity.expert_inputs(checkpoint.expert(0), latent_px, (500, 501))
    given: dict[str, Any] = {name: value[:1] for name, value in expert.items()}
    given |= parity.decoder_inputs(checkpoint.decoder(), latent_px)
    np.savez(path, **given)
    return path


@torch.no_grad()
def save_random(directory: Path, config: ModelConfig) -> None:
    """Write a checkpoint with seeded random weights that keep the features' size, layer by layer."""
    assert config.unet
    torch.manual_seed(0)
    networks = DenoisingUNet(config.unet), Autoencoder(config.decoder)
    for network in networks:
        for parameter in network.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    save_checkpoint(directory, config, [networks[0].state_dict()], networks[1].state_dict())


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--width", type=int, default=160, help="width of the UNet (default: 160, as published)")
    add("--channels", type=int, default=128, help="channels of the decoder (default: 128, as published)")
    add("--tile", type=int, default=512, metavar="PX", help="side of the tile (default: 512)")
    add("--quick", action="store_true", help="small networks and a small tile: a test of this program")
    add("--threads", type=int, default=usable_cores(), help="CPU threads (default: all cores)")
    add("--repeats", type=int, default=3, help="rounds of three steps and a decode (default: 3)")
    add(
        "--rungs",
        nargs="+",
        metavar="WORD",
        help="only rungs with one of these words in their name, and eager PyTorch (default: all)",
    )
    add("--demo", action="store_true", help="also measure the PSNR of the bundled x4 model on our rungs")
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="keep checkpoint, engines and cached graphs in it, in a folder per size and commit",
    )
    add("--json", action="store_true", help="print JSON in place of the page")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="also write the page, e.g. benchmarks/results/latency.md",
    )
    return p


if __name__ == "__main__":
    sys.exit(main())
