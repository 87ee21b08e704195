"""Make large images with a bundled engine and report time and memory by the size of the result.

Each size is run as a process of its own, `moesr-run` on an input that a generator writes, and is watched ten
times per second while it runs. The page has the largest values of its anonymous memory (what the process must
have), of its mapped memory (pages of files, which the system can take back), and of both together. The time
is that of the image in the log, from reading the input to the written result, in which the graphs are opened;
the start of the program is not in it. The smallest size is run once more before all others, so that the cache
holds the prepared graphs. In several `--rounds` the sizes take turns; the page has the median of the times
and the largest memory. With one step memory is the same as with many, but time is not: the page names the
number of steps. `--memory-only` runs each graph twice only, which takes a minute or two for 100 megapixels.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import benchlib.missing_extra  # noqa: F401
import numpy as np
from benchlib.machine import load_average
from benchlib.origin import origin_line
from benchlib.program import print_page
from PIL import Image

from moesr.runtime.engine.locate import engine_directory
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import MoesrError
from moesr.runtime.loop.tile_layout import TileLayout, usual_tiling

FEW_RUNS = Path(__file__).resolve().parent / "benchlib" / "few_runs.py"

INTERVAL_S = 0.1
"""Seconds between two looks at the memory of the process."""

TARGET_BYTES = 2e9
"""The memory that a result of 100 megapixels may take."""

TARGET_SPREAD = 0.1
"""By how much the time per megapixel of result may vary between 1 and 100 megapixels."""


@dataclass(frozen=True)
class Row:
    """The figures of one size; bytes are the largest that were seen, `load` is that before the run."""

    megapixels: float
    side: int  # of the input
    tiles: int  # that are decoded, and that each step samples
    seconds: float
    anonymous: int
    mapped: int
    together: int
    load: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the page; returns 0 or the exit code of the error."""
    return print_page(benchmark, parser().parse_args(argv))


def benchmark(args: argparse.Namespace) -> str:
    """Measure all sizes, and write and return the page."""
    manifest = read_manifest(engine_directory(args.engine))
    sides = [round((megapixels * 1e6) ** 0.5 / manifest.scale) for megapixels in args.megapixels]
    rounds: list[list[Row]] = []
    with tempfile.TemporaryDirectory(prefix="moesr-large-", dir=args.work) as scratch:
        if not args.memory_only:
            measure(Path(scratch), min(sides), manifest, args)
        for _ in range(args.rounds):
            rounds.append([])
            for side in sides:
                rounds[-1].append(measure(Path(scratch), side, manifest, args))
                print(json.dumps(rounds[-1][-1].__dict__), file=sys.stderr, flush=True)
    rows = [merged(runs) for runs in zip(*rounds, strict=True)]
    text = page(rows, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    return text


def write_input(path: Path, side: int) -> None:
    """Write a square image of waves and noise, row by row, so that the generator needs no memory."""
    rng = np.random.default_rng(side)
    x = np.arange(side, dtype=np.float32)
    pixels = np.empty((side, side, 3), np.uint8)
    for y in range(side):
        wave = 96 + 60 * np.sin(x / 17 + y / 29) + 30 * np.sin(x * y / 9000)
        pixels[y] = np.clip(wave[:, None] + rng.normal(0, 9, (side, 3)), 1, 254)
    Image.fromarray(pixels).save(path, compress_level=1)


def merged(rounds: Sequence[Row]) -> Row:
    """Return the median time and the largest memory of several runs of one size."""
    peaks = {name: max(getattr(row, name) for row in rounds) for name in ("anonymous", "mapped", "together")}
    return replace(rounds[0], seconds=median(row.seconds for row in rounds), **peaks)


def measure(folder: Path, side: int, manifest: Manifest, args: argparse.Namespace) -> Row:
    """Run one size in a process of its own. MoesrError if the process fails."""
    scale, tiles = manifest.scale, len(TileLayout(manifest, side, side, usual_tiling(manifest)).coding)
    source, target = folder / f"{side}.png", folder / f"{side}_large{args.format}"
    log = folder / "moesr.jsonl"
    if not source.exists():
        write_input(source, side)
    program = [str(FEW_RUNS)] if args.memory_only else ["-m", "moesr.runtime.cli.run"]
    command = [sys.executable, *program, str(source), "-o", str(target), "--force", "--quiet"]
    command += ["--engine", args.engine, "--steps", str(args.steps), "--backend", args.backend]
    command += ["--threads", str(args.threads), "--log", str(log)]
    before = load_average()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = [0, 0, 0]
    while process.poll() is None:
        peaks = [max(pair) for pair in zip(peaks, resident(process.pid), strict=True)]
        time.sleep(INTERVAL_S)
    if process.returncode:
        assert process.stderr
        raise MoesrError(f"{' '.join(command)}: {process.stderr.read().decode(errors='replace')[-800:]}")
    seconds = float(json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["seconds"])
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(target) as result:
        assert result.size == (side * scale, side * scale)
    target.unlink()
    anonymous, mapped, together = peaks
    return Row((side * scale) ** 2 / 1e6, side, tiles, seconds, anonymous, mapped, together, before)


def resident(pid: int) -> tuple[int, int, int]:
    """Anonymous, mapped and all resident bytes of a process; zeros once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0, 0, 0
    found = {
        name: 1024 * int(count) for name, count in re.findall(r"^(Rss\w+|VmRSS):\s+(\d+) kB", text, re.M)
    }
    mapped = found.get("RssFile", 0) + found.get("RssShmem", 0)
    return found.get("RssAnon", 0), mapped, found.get("VmRSS", 0)


def page(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """The results as Markdown."""
    how = ""
    if args.memory_only:
        how = (
            "Each graph ran twice and then left its output as it was (`--memory-only`), while everything "
            "around the graphs was done for all tiles; so no time is reported. "
        )
    lines = [
        "# Large images",
        "",
        origin_line(),
        "",
        f"Engine {args.engine}, {args.backend}, threads: {args.threads}, steps: {args.steps}, results as "
        f"{args.format[1:]}. {how}The inputs are squares of waves and noise. Each row is one process of "
        "`moesr-run`, watched ten times per second. Tiles are those that are decoded; every step samples "
        "about as many. Anonymous memory is what the process must have. Mapped memory are pages of libraries "
        "and temporary files, which the system can take back at any time. The load average is that of the "
        "minute before the start: other programs had a part in it if it is not near zero, and then the time "
        "is longer than on an idle machine.",
        "",
        "| result (MP) | input | tiles | time (s) | s per MP | s per tile | anonymous (MB) | mapped (MB) | "
        "both (MB) | load |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        load = "unknown" if row.load is None else f"{row.load:.1f}"
        sizes = (row.anonymous, row.mapped, row.together)
        times = (row.seconds, row.seconds / row.megapixels, row.seconds / row.tiles)
        shown = " | ".join("not measured" if args.memory_only else f"{t:.3g}" for t in times)
        lines.append(
            f"| {row.megapixels:.3g} | {row.side}x{row.side} | {row.tiles} | {shown} | "
            f"{' | '.join(f'{size / 1e6:.0f}' for size in sizes)} | {load} |"
        )
    return "\n".join([*lines, "", *verdict(rows)[2 * args.memory_only :], ""])


def verdict(rows: Sequence[Row]) -> list[str]:
    """Lines that compare the figures with the targets."""
    large = [row for row in rows if 0.9 <= row.megapixels <= 110] or list(rows)
    lines = []
    for what, times in (
        ("megapixel", [row.seconds / row.megapixels for row in large]),
        ("tile", [row.seconds / row.tiles for row in large]),
    ):
        spread = max(times) / min(times) - 1
        lines.append(
            f"- Time per {what} between {large[0].megapixels:.3g} and {large[-1].megapixels:.3g} megapixels: "
            f"the largest is {100 * spread:.0f} % above the smallest (target: {100 * TARGET_SPREAD:.0f} %)."
        )
    most = max(rows, key=lambda row: row.together)
    lines.append(
        f"- Most memory: {most.together / 1e9:.2f} GB at {most.megapixels:.3g} megapixels (target for 100: "
        f"{TARGET_BYTES / 1e9:.0f} GB)."
    )
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--megapixels", type=float, nargs="+", default=[1, 4, 16, 100], help="sizes of results")
    p.add_argument("--engine", default="demo-x4", help="engine directory, or name of a bundled engine")
    p.add_argument("--steps", type=int, default=20, help="sampling steps; 1 is enough for memory")
    p.add_argument("--backend", default="onnxruntime")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument(
        "--memory-only",
        action="store_true",
        help="run each graph twice only, then keep its last output: memory is the same, time is not reported",
    )
    p.add_argument("--rounds", type=int, default=1, help="runs per size")
    p.add_argument("--format", default=".png", help="extension of the results")
    p.add_argument("--work", type=Path, help="directory for inputs, results and spools")
    p.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/large.md"))
    return p


if __name__ == "__main__":
    sys.exit(main())
