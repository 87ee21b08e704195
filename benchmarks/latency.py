"""Time a step, a decode and an image: the engine against the same networks in eager PyTorch, on this machine.

Networks of the published shapes with random weights are exported, which proves the graphs against the
networks before anything is timed. The engine and eager PyTorch then take turns, each in a process of its own.
An image is one tile: STEPS steps and a decode in one go. Peak memory is that of the process, which holds one
expert and the decoder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import load_average, machine, machine_line, usable_cores
from torch import nn
from tqdm import tqdm

from moesr.export.package import check_tile, export_engine
from moesr.runtime.errors import MoesrError
from moesr.training.checkpoint import load_checkpoint, save_checkpoint
from moesr.training.config import AutoencoderConfig, ModelConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet

KINDS = ("engine", "eager")
WORKER = Path(__file__).with_name("latency_worker.py")
PROFILE_ROWS = 12
GIGA = 1e9


@dataclass(frozen=True)
class Row:
    """One quantity of both candidates; `ratio` is eager over engine: above 1 the engine is better."""

    what: str
    unit: str
    engine: float
    eager: float

    @property
    def ratio(self) -> float:
        """Eager over engine."""
        return self.eager / self.engine


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the table where asked: 0 done, otherwise the exit code of the error."""
    args = parser().parse_args(argv)
    config = ModelConfig(
        name="latency",
        unet=UNetConfig(width=args.width, space_experts=1),
        decoder=AutoencoderConfig(channels=args.channels),
        expert_ranges=((0, 1000),),
    )
    try:
        check_tile(config, args.tile)
        with tempfile.TemporaryDirectory(prefix="moesr-latency-") as scratch:
            result = measure(config, Path(scratch), args)
    except MoesrError as error:
        print(f"latency: {error}", file=sys.stderr)
        return error.exit_code
    text = markdown(result)
    print(json.dumps(result, indent=1) if args.json else text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n", encoding="utf-8")
    return 0


def measure(config: ModelConfig, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Export, prove, time and profile; returns JSON values."""
    print(machine_line(), file=sys.stderr)
    load = load_average()  # before this program adds to it
    with tqdm(total=2 + 3 + args.repeats, unit="stage", file=sys.stderr, disable=None) as bar:
        bar.set_description("write a checkpoint with random weights")
        save_random(scratch / "checkpoint", config)
        bar.update()
        bar.set_description("export and prove")
        manifest = export_engine(
            load_checkpoint(scratch / "checkpoint"), scratch / "engine", tile_px=args.tile
        )
        bar.update()
        directories = {"engine": scratch / "engine", "eager": scratch / "checkpoint"}
        rows = time_both(directories, args, bar)
        bar.set_description("profile the engine")
        where = json.loads(_output("profile", directories["engine"], args))
        bar.update()
    return {
        "machine": machine(),
        "machine_line": machine_line(),
        "load_average": load,
        "settings": {
            k: getattr(args, k) for k in ("width", "channels", "tile", "steps", "threads", "repeats")
        },
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
        "macs": {role: graph.macs for role, graph in manifest.graphs.items()},
        "parity": {role: asdict(g.parity) for role, g in manifest.graphs.items() if g.parity},
        "where": where,
    }


def time_both(directories: dict[str, Path], args: argparse.Namespace, bar: tqdm) -> list[Row]:
    """Medians of both candidates, measured in turns."""
    seconds: dict[tuple[str, str], list[float]] = {}
    peak: dict[str, float] = {}
    with _worker("engine", directories, args) as first, _worker("eager", directories, args) as second:
        workers = {"engine": first, "eager": second}

        def turn(command: str, what: str) -> None:
            for kind in KINDS:
                answer = workers[kind].ask(command)
                seconds.setdefault((what, kind), []).append(answer["seconds"])
                peak[kind] = answer["peak_bytes"] / GIGA

        bar.set_description("load and warm up")
        for kind in KINDS:
            seconds["load", kind] = [workers[kind].loaded]
        turn("step", "first step")
        turn("decode", "first decode")
        bar.update()
        for repeat in range(args.repeats):
            bar.set_description(f"steps and decodes, round {repeat + 1} of {args.repeats}")
            for _ in range(3):
                turn("step", "step")
            turn("decode", "decode")
            bar.update()
        bar.set_description(f"an image of {args.steps} steps")
        turn(f"image {args.steps}", f"image ({args.steps} steps)")
        bar.update()
    names = dict.fromkeys(what for what, _ in seconds)
    rows = [Row(what, "s", *(median(seconds[what, kind]) for kind in KINDS)) for what in names]
    return [*rows, Row("peak memory", "GB", peak["engine"], peak["eager"])]


class Worker:
    """A candidate's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.loaded: float = self._answer()["seconds"]

    def ask(self, command: str) -> dict[str, float]:
        """Have it run a command; its answer."""
        assert self._process.stdin
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise MoesrError(
                f"a benchmark process ended with code {self._process.wait()}; see its message above"
            )
        return json.loads(line)


@contextmanager
def _worker(kind: str, directories: dict[str, Path], args: argparse.Namespace) -> Iterator[Worker]:
    command = _command(kind, directories[kind], args)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Worker(process)
        finally:
            assert process.stdin
            process.stdin.close()


def _output(kind: str, directory: Path, args: argparse.Namespace) -> str:
    return subprocess.run(
        _command(kind, directory, args), check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _command(kind: str, directory: Path, args: argparse.Namespace) -> list[str]:
    return [sys.executable, str(WORKER), kind, str(directory), str(args.threads), str(args.tile)]


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


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: machine, settings, table, where the engine's time goes."""
    s, load = result["settings"], result["load_average"]
    lines = [
        f"Machine: {result['machine_line']}.",
        "",
        f"UNet width {s['width']}, decoder channels {s['channels']}, one tile of {s['tile']} px, float32, "
        f"{s['threads']} threads, medians of {s['repeats']} round{'s' * (s['repeats'] > 1)} in turns"
        + (f", load average {load:.1f} at the start." if load is not None else "."),
        "",
        "| | engine | eager PyTorch | ratio |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['what']} ({r['unit']}) | {r['engine']:.3g} | {r['eager']:.3g} | {r['ratio']:.2f} |"
        for r in result["rows"]
    ]
    for name, proof in result["parity"].items():
        lines += ["", f"Parity of {name}: relative L2 error {proof['relative_l2']:.1e} against the network."]
    for name, groups in result["where"].items():
        for group, entries in groups.items():
            lines += ["", *_share(f"{name}, by {group[:-1]}", entries)]
    return "\n".join(lines)


def _share(title: str, entries: dict[str, float]) -> list[str]:
    total = sum(entries.values())
    rows = list(entries.items())[:PROFILE_ROWS]
    rest = total - sum(v for _, v in rows)
    rows += [("all others", rest)] if len(entries) > PROFILE_ROWS else []
    head = [f"| engine's time: {title} | ms | share |", "| --- | --- | --- |"]
    return [*head, *(f"| {name} | {ms:.0f} | {100 * ms / total:.0f} % |" for name, ms in rows)]


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--width", type=int, default=160, help="width of the UNet (default: 160, as published)")
    add("--channels", type=int, default=128, help="channels of the decoder (default: 128, as published)")
    add("--tile", type=int, default=512, metavar="PX", help="side of the tile (default: 512)")
    add("--steps", type=int, default=20, help="steps of the image (default: 20)")
    add("--threads", type=int, default=usable_cores(), help="threads of both (default: all cores)")
    add("--repeats", type=int, default=3, help="rounds of three steps and a decode (default: 3)")
    add("--json", action="store_true", help="print JSON in place of the table")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="also write the table, e.g. benchmarks/results/latency.md",
    )
    return p


if __name__ == "__main__":
    sys.exit(main())
