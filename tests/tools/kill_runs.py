"""Kill `moesr-run` over a folder at random moments, run it again, and check what is left.

python tests/tools/kill_runs.py --kills 100

No result may be incomplete or lost, and the next run may repeat only the images that were in progress.
Prints one line with the outcome, and exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moesr.runtime.images import provenance

BEGUN = "run_program"
"""The function in every traceback of the program; one without it is Python's, interrupted while it starts."""


def command(engine: str, photos: Path, out: Path, log: Path) -> list[str]:
    """Return the command whose process is killed."""
    program = [sys.executable, "-m", "moesr.runtime.cli.run", "--engine", engine]
    options = ["--steps", "1", "--backend", "onnxruntime", "--threads", "1", "--quiet", "--log", str(log)]
    return [*program, str(photos), "-o", f"{out}/", *options]


def make_photos(folder: Path, count: int) -> None:
    """Write small images of noise."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        pixels = rng.integers(0, 256, (16 + number % 5, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


def check(engine: str, kills: int, images: int, seed: int, folder: Path) -> list[str]:
    """Kill and repeat runs, and return the faults found."""
    photos, out, log = folder / "photos", folder / "out", folder / "moesr.jsonl"
    make_photos(photos, images)
    begin = time.perf_counter()
    subprocess.run(
        command(engine, photos, folder / "whole", folder / "whole.jsonl"), check=True, capture_output=True
    )
    duration = time.perf_counter() - begin
    draw, faults, finished, known = random.Random(seed), list[str](), set[str](), 0
    for number in range(kills):
        if len(finished) == images:  # all images are done, so begin again with an empty directory
            for path in out.iterdir():
                path.unlink()
            finished.clear()
        process = subprocess.Popen(
            command(engine, photos, out, log), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        time.sleep(draw.uniform(0.0, 1.1 * duration))
        process.send_signal(draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        errors = process.communicate()[1].decode(errors="replace")
        if "Traceback" in errors and BEGUN in errors:
            faults.append(f"kill {number}: {errors[-300:]}")
        names = {path.name for path in out.iterdir()} if out.exists() else set()
        results = {name for name in names if not name.startswith(".moesr-")}
        faults += [
            f"kill {number}: {name} is partial" for name in results if not provenance.is_whole(out / name)
        ]
        faults += [f"kill {number}: {name} is lost" for name in finished - results]
        again = [name for name in _done(log)[known:] if name in finished]
        faults += [f"kill {number}: {name} is made again" for name in again]
        finished, known = results, len(_done(log))
    subprocess.run(command(engine, photos, out, log), check=True, capture_output=True)
    whole = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    faults += [
        f"{name} differs, is missing or is left over"
        for name in whole.keys() | left.keys()
        if whole.get(name) != left.get(name)
    ]
    lines = Counter(json.loads(line)["status"] for line in log.read_text().splitlines())
    if set(lines) - {"done", "skipped"}:
        faults.append(f"the log has {dict(lines)}")
    return faults


def _done(log: Path) -> list[str]:
    """Return the names of finished results in the order of the log."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [Path(values["result"]).name for values in map(json.loads, lines) if values["status"] == "done"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--images", type=int, default=12)
    p.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: %(default)s)")
    p.add_argument("--engine", default="demo-x4")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        faults = check(args.engine, args.kills, args.images, args.seed, Path(folder))
    for fault in faults:
        print(fault)
    print(f"{args.kills} kills of runs over {args.images} images, seed {args.seed}: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
