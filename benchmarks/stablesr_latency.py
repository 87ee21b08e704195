"""Time StableSR's step, encoding and decoding: the engine against the same networks in eager PyTorch.

Networks of the published shapes with random weights are exported, and the export compares the graphs with the
networks before anything is timed. With --work, checkpoint and engine are kept and reused. For each graph, the
engine and eager PyTorch then alternate on one tile, each in a process of its own. The engine loads its files
without hashing them again; PyTorch loads the checkpoint, whose weights are in half precision. Peak memory is
that of a process with one graph or network. The text is encoded once, when the engine is made. A graph has
fewer multiply-accumulates than its network if it uses Winograd convolutions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import benchlib.missing_extra  # noqa: F401
import numpy as np
import torch
from benchlib.machine import load_average, machine, machine_line, usable_cores
from benchlib.origin import origin_line, work_folder
from ladder.rounds import GIGA, Row, Worker
from ladder.worker import Inputs, Run, peak_bytes, serve
from torch import Tensor, nn
from tqdm import tqdm

from moesr.export.graphs.stablesr import LatentDecoder, LatentEncoder, StableSRExpert
from moesr.export.options import ExportOptions
from moesr.export.package import check_tile, export_engine
from moesr.runtime.backends.selection import select_backend
from moesr.runtime.engine.graph_spec import Graph
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import MANIFEST_NAME, read_manifest
from moesr.runtime.errors import MoesrError
from moesr.training.checkpoint import CONFIG_NAME, StableSRCheckpoint, load_checkpoint, save_checkpoint
from moesr.training.config import StableSRConfig
from moesr.training.weights import networks

KINDS = ("engine", "eager")
ROLES = {"step": "expert_0", "encoding": "encoder", "decoding": "decoder"}
STEPS = StableSRConfig.steps


@dataclass(frozen=True)
class Timed:
    """One graph: its rows of the table, and its multiply-accumulates for one tile."""

    what: str
    rows: tuple[Row, ...]
    macs: int

    @property
    def seconds(self) -> Row:
        """The row of a run after the first."""
        return next(row for row in self.rows if row.what == self.what)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and optionally write it; returns 0 or the exit code of the error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["worker"]:
        return work(*arguments[1:])
    args = parser().parse_args(arguments)
    config = StableSRConfig(name="latency")
    try:
        check_tile(config, args.tile)
        with tempfile.TemporaryDirectory(prefix="moesr-stablesr-") as scratch:
            place = work_folder(args.work or Path(scratch), tile=args.tile)
            place.mkdir(parents=True, exist_ok=True)
            manifest = prepare(config, place, args.tile)
            result = {} if args.prepare else measure(manifest, place, args)
    except MoesrError as error:
        print(f"stablesr_latency: {error}", file=sys.stderr)
        return error.exit_code
    if args.prepare:
        return 0
    print(json.dumps(result, indent=1) if args.json else markdown(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(markdown(result) + "\n", encoding="utf-8")
    return 0


def prepare(config: StableSRConfig, place: Path, tile_px: int) -> Manifest:
    """Write the checkpoint and the engine unless they exist; returns the engine's manifest."""
    if not (place / "checkpoint" / CONFIG_NAME).is_file():
        save_random(place / "checkpoint", config)
    engine = place / f"engine-{tile_px}"
    if not (engine / MANIFEST_NAME).is_file():
        export_engine(load_checkpoint(place / "checkpoint"), engine, ExportOptions(tile_px=tile_px))
    return read_manifest(engine, verify=False)


@torch.no_grad()
def save_random(directory: Path, config: StableSRConfig) -> None:
    """Write a checkpoint with seeded random weights that keep the features' size, layer by layer."""
    kinds = networks(config)

    def state(part: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        kind, sizes = kinds[part]
        network: nn.Module = kind(sizes)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        return network.state_dict()

    others = ((part, state(part)) for part in ("structure", "text"))
    experts = (state("expert") for _ in range(1))
    save_checkpoint(directory, config, experts, state("decoder"), others=others, dtype=torch.float16)


def measure(manifest: Manifest, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Time every graph; returns JSON values."""
    print(machine_line(), file=sys.stderr)
    load = load_average()  # before this program adds to it
    with tqdm(total=len(args.graphs) * (args.repeats + 2), unit="turn", file=sys.stderr, disable=None) as bar:
        timed = [time_both(what, manifest.graphs[ROLES[what]], place, args, bar) for what in args.graphs]
    graphs = [{"what": t.what, "macs": t.macs, "rows": [asdict(row) for row in t.rows]} for t in timed]
    return {
        "machine": machine(),
        "origin": origin_line(),
        "load_average": load,
        "settings": {k: getattr(args, k) for k in ("tile", "threads", "repeats")},
        "graphs": graphs,
        "image": asdict(image_row(timed)) if {t.what for t in timed} == ROLES.keys() else None,
        "params": sum(graph.params for graph in manifest.graphs.values()),
        "stored": manifest.graphs["expert_0"].stored or manifest.graphs["expert_0"].precision,
        "parity": {role: asdict(g.parity) for role, g in manifest.graphs.items() if g.parity},
    }


def image_row(timed: Sequence[Timed]) -> Row:
    """Return the row of an image of one tile, the sum of its parts."""
    runs = {t.what: STEPS if t.what == "step" else 1 for t in timed}
    seconds = [sum(runs[t.what] * getattr(t.seconds, kind) for t in timed) for kind in KINDS]
    return Row(f"image ({STEPS} steps), as a sum", "s", *seconds)


def time_both(what: str, graph: Graph, place: Path, args: argparse.Namespace, bar: tqdm) -> Timed:
    """Measure a graph and its network alternately: loading, first run, median of later runs, peak memory."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    peak: dict[str, float] = {}
    bar.set_description(f"{what}: load")
    with _worker("engine", what, place, args) as first, _worker("eager", what, place, args) as second:
        workers = {"engine": first, "eager": second}
        bar.update()
        for turn in range(args.repeats + 1):
            bar.set_description(f"{what}: turn {turn} of {args.repeats}")
            for kind in KINDS:
                answer = workers[kind].ask("step")
                seconds[kind].append(answer["seconds"])
                peak[kind] = answer["peak_bytes"] / GIGA
            bar.update()
    rows = (
        Row(f"{what}: load", "s", first.loaded, second.loaded),
        Row(f"{what}: first run", "s", *(seconds[kind][0] for kind in KINDS)),
        Row(what, "s", *(median(seconds[kind][1:]) for kind in KINDS)),
        Row(f"{what}: peak memory", "GB", peak["engine"], peak["eager"]),
    )
    return Timed(what, rows, graph.macs)


@contextmanager
def _worker(kind: str, what: str, place: Path, args: argparse.Namespace) -> Iterator[Worker]:
    command = [sys.executable, __file__, "worker", kind, what, str(place), str(args.threads), str(args.tile)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Worker(process)
        finally:
            assert process.stdin
            process.stdin.close()


def work(kind: str, what: str, place: str, threads: str, tile_px: str) -> int:
    """Load one candidate, print the load time, then run it for every line read from stdin."""
    role, manifest = ROLES[what], read_manifest(Path(place) / f"engine-{tile_px}", verify=False)
    values = inputs(manifest.graphs[role])
    begin = time.perf_counter()
    if kind == "engine":
        run = engine_run(Path(place) / f"engine-{tile_px}", manifest.graphs[role], values, int(threads))
    else:
        prompts = max(1, len(manifest.prompts))
        run = eager_run(Path(place) / "checkpoint", role, values, int(threads), prompts)
    answer = {"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}
    print(json.dumps(answer), flush=True)
    serve(run, run)
    return 0


def inputs(graph: Graph) -> Inputs:
    """Return seeded inputs of a graph for one tile: noise, timestep 500, fidelity 0.5, the first prompt."""
    rng, fixed = np.random.Generator(np.random.PCG64(0)), {"t": 500.0, "fidelity": 0.5, "prompt": 0.0}
    shapes = {spec.name: [1, *spec.dims[1:]] for spec in graph.inputs}
    return {
        n: np.full(s, fixed[n], np.float32) if n in fixed else rng.standard_normal(s, np.float32)
        for n, s in shapes.items()
    }


def engine_run(directory: Path, graph: Graph, values: Inputs, threads: int) -> Run:
    """Return a function that runs a graph as the runtime does."""
    backend = select_backend("onnxruntime", "cpu", threads)
    device = backend.device()
    session = backend.open(directory, graph)
    buffers = {
        spec.name: device.buffer(spec, 1) for spec in (*session.boundary.inputs, *session.boundary.outputs)
    }
    for spec in session.boundary.inputs:
        buffers[spec.name][...] = values[spec.name]
    session.bind(buffers, 1)
    return lambda: session.enqueue(1)


def eager_run(directory: Path, role: str, values: Inputs, threads: int, prompts: int = 1) -> Run:
    """Return a function that runs the networks of a role in eager PyTorch."""
    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(directory)
    assert isinstance(checkpoint, StableSRCheckpoint)
    config = checkpoint.config
    if role == "expert_0":
        text = torch.zeros(prompts, config.text.tokens, config.text.width)
        unet, structure = checkpoint.unet(), checkpoint.structure()
        network: nn.Module = StableSRExpert(unet, structure, text, config.prediction)
    else:
        kind = LatentEncoder if role == "encoder" else LatentDecoder
        network = kind(checkpoint.decoder(), config.latent_scale)
    tensors = [torch.from_numpy(value) for value in values.values()]
    network.eval()

    @torch.inference_mode()
    def run() -> object:
        return network(*tensors)

    return run


def markdown(result: dict[str, Any]) -> str:
    """Return the page: machine, settings and table."""
    s, load = result["settings"], result["load_average"]
    lines = [
        "# Latency of StableSR",
        "",
        result["origin"],
        "",
        f"StableSR with random weights ({result['params'] / 1e6:.0f} M parameters in the engine's graphs), "
        f"one tile of {s['tile']} px, float32 (stored as {result['stored']}), {s['threads']} threads, "
        f"medians of {s['repeats']} in turns"
        + (f", load average {load:.1f} at the start." if load is not None else "."),
        "",
        "| | engine | eager PyTorch | ratio | GMAC/s of the graph |",
        "| --- | --- | --- | --- | --- |",
    ]
    for graph in result["graphs"]:
        for r in graph["rows"]:
            rate = f"{graph['macs'] / r['engine'] / GIGA:.0f}" if r["what"] == graph["what"] else ""
            lines.append(_cells(r, rate))
    lines += [_cells(result["image"], "")] if result["image"] else []
    for name, proof in result["parity"].items():
        lines += ["", f"Parity of {name}: relative L2 error {proof['relative_l2']:.1e} against the network."]
    return "\n".join(lines)


def _cells(row: dict[str, Any], rate: str) -> str:
    values = f"{row['engine']:.3g} | {row['eager']:.3g} | {row['eager'] / row['engine']:.2f}"
    return f"| {row['what']} ({row['unit']}) | {values} | {rate} |"


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--work", type=Path, metavar="DIR", help="keep checkpoint and engine (10 GB) below it (default: no)")
    add("--graphs", nargs="+", choices=tuple(ROLES), default=tuple(ROLES), help="(default: all)")
    add("--prepare", action="store_true", help="only write checkpoint and engine")
    add("--tile", type=int, default=512, metavar="PX", help="side of the tile (default: 512)")
    add("--threads", type=int, default=usable_cores(), help="CPU threads (default: all cores)")
    add("--repeats", type=int, default=3, help="runs of each graph after the first (default: 3)")
    add("--json", action="store_true", help="print JSON in place of the table")
    add("-o", "--output", type=Path, metavar="FILE", help="also write the table")
    return p


if __name__ == "__main__":
    sys.exit(main())
