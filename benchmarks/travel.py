"""List what to leave out when the tree is copied to a machine with a GPU that takes little at a time.

Prints one path per line for `rsync --exclude-from` or `git sparse-checkout`: the bundled engines and
checkpoints, and as many further folders that `benchmarks/gpu.py` does not read as are needed for the rest to
stay below the limit. Exit code 1 if that is not possible.

    python benchmarks/travel.py --limit 60 > leave-out.txt
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

ALWAYS = ("runtime/demo_engines", "training/demo_checkpoints")
SPARE = ("tests", "benchmarks/results", "docs")
"""Folders that the benchmark does not read; those of SPARE are left out one by one if they have to be."""


def sizes_of(repository: Path) -> dict[str, int]:
    """Return the bytes of every file that is tracked, or that is neither tracked nor ignored."""
    command = ["git", "-C", repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    paths = {name: repository / name for name in set(filter(None, listed))}
    return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}


def leave_out(sizes: Mapping[str, int], limit: int) -> tuple[list[str], int]:
    """Return folders to leave out, and the bytes of the rest."""
    rest, left = dict(sizes), []
    for folder in (*ALWAYS, *SPARE):
        if folder in SPARE and sum(rest.values()) <= limit:
            break
        kept = {name: size for name, size in rest.items() if not name.startswith(f"{folder}/")}
        if len(kept) < len(rest):
            left.append(folder)
        rest = kept
    return left, sum(rest.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=60.0, metavar="MIB", help="default: %(default)s")
    limit = parser.parse_args(arguments).limit
    sizes = sizes_of(REPO)
    left, rest = leave_out(sizes, int(limit * (1 << 20)))
    print("\n".join(left))
    total = sum(sizes.values())
    print(f"{total / (1 << 20):.1f} MiB in all, {rest / (1 << 20):.1f} MiB without these", file=sys.stderr)
    return int(rest > limit * (1 << 20))


if __name__ == "__main__":
    sys.exit(main())
