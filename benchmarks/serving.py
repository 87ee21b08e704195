"""Measure the service under load: many clients with images of mixed sizes, and hostile clients.

Starts `moesr-serve` as a process of its own on 127.0.0.1 and sends requests to that address alone. Measures
how long a small image takes behind a large one, and throughput, latencies, slots filled per tick and memory
over time below, at and above the capacity of the machine. Every result is compared with that of the same
input sent alone. The page of results is written after every load.
Exit codes: 0 done, 1 a result differed or a hostile request was not refused.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import benchlib.missing_extra  # noqa: F401
from benchlib.origin import origin_line
from load_test import fairness
from load_test.fairness import Fairness
from load_test.hostile import Hostile
from load_test.loads import Clients, Kind, Load
from load_test.page import Results, page
from load_test.pictures import picture
from load_test.server import Server, Watch, served

SIZES = ((48, 64), (96, 128), (64, 64), (192, 144))
"""Heights and widths of the inputs, in pixels; clients take them in turns."""

PAGE = Path(__file__).parent / "results" / "serving.md"
BELOW = 0.5
"""Rate of the load below capacity, as a fraction of the rate of serving one by one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loads and write the page."""
    args = parser().parse_args(argv)
    allow_open_files(4096)
    results = Results(args.engine, args.steps, origin_line(), SIZES, Fairness(args.small, args.large))
    with tempfile.TemporaryDirectory(prefix="moesr-serving-") as scratch:
        options = ["--state", str(Path(scratch, "state")), "--engine", args.engine, "--idle", "2"]
        with served([*options, "--queue", str(args.clients + 2)]) as server, Watch(server) as watch:
            unrefused = measure(server, args, results, watch)
    results.finished = True
    text = page(results)
    args.output.write_text(text, encoding="utf-8")
    print(text)
    for name, answers in unrefused.items():
        print(f"not refused: {name}: {dict(answers)}", file=sys.stderr)
    return int(any(load.wrong for load in results.loads) or bool(unrefused))


def measure(server: Server, args: argparse.Namespace, results: Results, watch: Watch) -> dict:
    """Run all loads within the time of the arguments; return the hostile requests that were not refused."""
    end = time.monotonic() + args.minutes * 60
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    want = [server.upscale(image, args.steps)[1] for image in images]
    clients, hostile = Clients(server, images, want, args.steps), Hostile(server, images[0])
    print("a small image behind a large one", file=sys.stderr)
    fairness.small_behind_large(server, args.steps, results.fairness)
    print("a folder", file=sys.stderr)
    fairness.folder(args.engine, args.steps, SIZES, results.fairness)
    args.output.write_text(page(results), encoding="utf-8")
    plan = kinds(args.clients, args.over)
    while plan:
        kind = plan.pop(0)
        if kind.rate is not None:
            kind = with_rate(kind, results.loads)
        seconds = (end - time.monotonic()) * kind.part / (kind.part + sum(one.part for one in plan))
        print(f"{kind.name}: {seconds:.0f} s", file=sys.stderr)
        with hostile if kind.hostile else nullcontext():
            results.loads.append(clients.run(kind, max(seconds, 1.0)))
        results.memory, results.hostile = list(watch.samples), hostile.answers
        args.output.write_text(page(results), encoding="utf-8")
    return hostile.unrefused


def kinds(clients: int, over: int) -> list[Kind]:
    """Return the loads in their order."""
    many = f"{clients} clients"
    return [
        Kind("1 client", 1, 0.1),
        Kind(f"{many}, served one by one", clients, 0.2, in_turns=True),
        Kind(f"{many}, below capacity", clients, 0.15, rate=BELOW),
        Kind(f"{many}, at capacity", clients, 0.2),
        Kind(f"{many}, at capacity, with hostile clients", clients, 0.2, hostile=True),
        Kind(f"{over} clients, more than the queue holds", over, 0.15),
    ]


def with_rate(kind: Kind, loads: Sequence[Load]) -> Kind:
    """Turn the relative rate of a load into images per second, by the rate of serving one by one."""
    one_by_one = next(load.rate for load in loads if load.kind.in_turns)
    rate = max((kind.rate or 1.0) * one_by_one, 0.01)
    return Kind(f"{kind.name} ({rate:.2f} images per s)", kind.clients, kind.part, rate=rate)


def allow_open_files(wanted: int) -> None:
    """Raise the limit of open files of this process, as far as the system allows."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--engine", default="demo-x4", metavar="DIR", help="engine directory or name (default: %(default)s)")
    add("--clients", type=int, default=8, metavar="N", help="clients at once (default: %(default)s)")
    text = "clients of the load above capacity; the queue holds two images more than --clients"
    add("--over", type=int, default=16, metavar="N", help=f"{text} (default: %(default)s)")
    add("--steps", type=int, default=5, metavar="N", help="sampling steps (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        default=30.0,
        metavar="M",
        help="minutes for all loads (default: %(default)g)",
    )
    text = "side in pixels of a square image that is timed behind a large one (default: %(default)s)"
    add("--small", type=int, default=500, metavar="PX", help=text)
    text = "side in pixels of that large image (default: %(default)s)"
    add("--large", type=int, default=4000, metavar="PX", help=text)
    text = "page of results (default: benchmarks/results/serving.md)"
    add("-o", "--output", type=Path, default=PAGE, metavar="FILE", help=text)
    return p


if __name__ == "__main__":
    sys.exit(main())
