"""Plot the training loss and the validation PSNR of a run over its steps, from its losses.jsonl:

python benchmarks/curves.py runs/demo-x4/decoder -o benchmarks/results/demo-x4/curve.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import benchlib.missing_extra  # noqa: F401
import numpy as np
from benchlib import (
    figures,
)

from moesr.training.loop.metrics_log import LOG_NAME

WINDOW = 100  # steps that are averaged, since the loss varies more between batches than during training


def series(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the steps and values of `key` from a metrics log; two empty arrays if there are none."""
    lines = map(json.loads, path.read_text("utf-8").splitlines())
    pairs = [(line["step"] + 1, line[key]) for line in lines if key in line]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, int), np.array(values, float)


def smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average over windows of WINDOW values, each placed at its last step; an incomplete one is dropped."""
    count = len(values) // WINDOW
    means = values[: count * WINDOW].reshape(count, WINDOW).mean(axis=1)
    return steps[WINDOW - 1 : count * WINDOW : WINDOW], means


def main(argv: Sequence[str] | None = None) -> int:
    """Plot one run; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a stage, which holds losses.jsonl")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args(argv)
    plt, path = figures.pyplot(), args.run / LOG_NAME
    if plt is None or not path.exists():
        print(figures.MATPLOTLIB_MISSING if plt is None else f"{path}: no such file", file=sys.stderr)
        return 2
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(*smoothed(*series(path, "l1")))
    left.set(title=f"L1 in training, means of {WINDOW} steps", xlabel="steps")
    right.plot(*series(path, "val_psnr"), "o-", ms=4)
    right.set(title="PSNR of validation crops, dB", xlabel="steps")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
