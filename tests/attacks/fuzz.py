"""Run the fuzz targets on many examples and report how often each outcome occurred.

Examples are drawn by hypothesis from a seed. Each kind of failure (the exception and where it was raised) is
reported once, and the examples go on, so that one fault does not hide the next. Exit codes: 0 no failure, 1
some.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]

from fuzz_targets import TARGETS, Target, run_example  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

MAX_FAILURES = 20
"""A target is given up after this many kinds of failure."""

CHUNK = 250
"""A line of progress is printed after each this many examples."""


def main() -> int:
    """Run the targets and return the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--examples",
        type=int,
        default=10_000,
        help="examples of all targets together (default: %(default)s)",
    )
    p.add_argument("--target", choices=TARGETS, action="append", help="targets to run (default: all)")
    p.add_argument("--seed", type=int, default=0, help="seed of the examples (default: %(default)s)")
    args = p.parse_args()
    chosen = args.target or list(TARGETS)
    whole = sum(TARGETS[name].share for name in chosen)
    failed = False
    print(
        "| target | examples | seconds | outcomes | failures |\n| --- | --- | --- | --- | --- |", flush=True
    )
    for name in chosen:
        count = round(args.examples * TARGETS[name].share / whole)
        began = time.perf_counter()
        outcomes, failures = run_target(TARGETS[name], count, args.seed)
        told = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())
        took = time.perf_counter() - began
        print(f"| {name} | {sum(outcomes.values())} | {took:.0f} | {told} | {len(failures)} |", flush=True)
        for kind, example in failures.items():
            print(f"\n{name}: {kind}, shortest example:\n{example}", file=sys.stderr, flush=True)
        failed |= bool(failures)
    return int(failed)


def run_target(target: Target, count: int, start: int) -> tuple[Counter[str], dict[str, str]]:
    """Return the outcomes of `count` examples and the shortest example of each kind of failure."""
    outcomes: Counter[str] = Counter()
    failures: dict[str, str] = {}

    def check(value: object) -> None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes[run_example(target, value, Path(folder))] += 1
            except Exception as error:
                outcomes["failure"] += 1
                frames = traceback.extract_tb(error.__traceback__)
                where = "; ".join(f"{Path(f.filename).name}:{f.name}" for f in frames[-3:])
                kind = f"{type(error).__name__} in {where}"
                example = f"{value!r}"
                if kind not in failures:
                    print(f"\n{kind}\n{str(error)[:500]}\n{example}\n", file=sys.stderr, flush=True)
                if len(example) < len(failures.get(kind, example + ".")):
                    failures[kind] = example

    drawn = 0
    numbers = random.Random(start)
    while drawn < count and len(failures) < MAX_FAILURES:
        size = min(CHUNK, count - drawn)
        run = settings(
            max_examples=size,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(seed(numbers.getrandbits(64))(given(target.inputs)(check)))
        run()
        drawn += size
        print(f"{drawn} of {count}, {len(failures)} kinds of failure", file=sys.stderr, flush=True)
    return outcomes, failures


if __name__ == "__main__":
    sys.exit(main())
