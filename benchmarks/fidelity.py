"""Measure what an engine's fidelity trades: PSNR and sharpness at several weights, as a table and a plot.

Sharpness is the mean gradient magnitude of luma as a share of the original's: 1 is as sharp, less is softer.
Written to the output directory: fidelity.md and, with matplotlib, fidelity.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import figures
import metrics
import numpy as np
from pairs import DEGRADATIONS, degrade, load_originals

from moesr.runtime.errors import MoesrError, UsageError
from moesr.runtime.resize import imresize
from moesr.runtime.upscaler import Upscaler

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
BICUBIC = "bicubic"


def sharpness(sr: np.ndarray, hr: np.ndarray, scale: int) -> float:
    """Mean gradient magnitude of `sr` over that of `hr`, uint8 [H, W, 3] both, without a border."""
    planes = (metrics.measured_luma(image, scale) for image in (sr, hr))
    a, b = (np.hypot(np.diff(y, axis=0)[:, 1:], np.diff(y, axis=1)[1:]).mean() for y in planes)
    return float(a / b)


def measure(
    up: Upscaler, originals: Mapping[str, np.ndarray], kind: str, weights: Sequence[float], steps: int
) -> dict[str, tuple[float, float]]:
    """Mean PSNR in dB and mean sharpness over the originals, for bicubic and for every weight.

    Raises UsageError where the degradation `kind` is of another scale than the engine.
    """
    scale = up.manifest.scale
    if DEGRADATIONS[kind] != scale:
        raise UsageError(
            f"--degrade {kind}: {up.manifest.name} upscales by {scale}; choose a degradation of that scale"
        )

    def bicubic(lr: np.ndarray) -> np.ndarray:
        return imresize(lr, *(side * scale for side in lr.shape[:2]))

    methods: dict[str, Callable[[np.ndarray], np.ndarray]] = {BICUBIC: bicubic}
    methods |= {f"{w:g}": partial(up, steps=steps, fidelity=w) for w in weights}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for name, hr in originals.items():
        lr = degrade(hr, kind, name)
        for method, upscale in methods.items():
            sr = upscale(lr)
            planes = (metrics.measured_luma(image, scale) for image in (sr, hr))
            found[method].append((metrics.psnr(*planes), sharpness(sr, hr, scale)))
    return {
        method: (float(np.mean([p for p, _ in rows])), float(np.mean([s for _, s in rows])))
        for method, rows in found.items()
    }


def page(title: str, found: Mapping[str, tuple[float, float]]) -> str:
    """The Markdown table."""
    rows = "".join(f"| {name} | {psnr:.2f} | {sharp:.3f} |\n" for name, (psnr, sharp) in found.items())
    return f"# {title}\n\n| Fidelity | PSNR↑ | sharpness |\n| --- | ---: | ---: |\n{rows}"


def draw(plt: Any, found: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Plot PSNR against sharpness, the weights joined by a line and bicubic beside it."""
    figure, axis = plt.subplots(figsize=(4.4, 3.3), layout="constrained")
    own = [value for name, value in found.items() if name != BICUBIC]
    axis.plot([s for _, s in own], [p for p, _ in own], "o-", ms=5)
    axis.plot(found[BICUBIC][1], found[BICUBIC][0], "s", ms=5, color="grey")
    for name, (psnr, sharp) in found.items():
        axis.annotate(name, (sharp, psnr), (4, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="sharpness (1: the original's)", ylabel="PSNR, dB")
    axis.margins(0.2)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--engine", type=Path, metavar="DIR", help="engine (default: the bundled demo-x4)")
    add("--hr", default="demo", metavar="DIR", help="originals; demo: three photographs (default: demo)")
    add("--degrade", choices=DEGRADATIONS, default="x4-bicubic", help="how LR is made (default %(default)s)")
    add("--weights", type=float, nargs="+", default=WEIGHTS, metavar="W", help="(default: 0 0.25 0.5 0.75 1)")
    add("--steps", type=int, default=20, metavar="N", help="of sampling (default %(default)s)")
    add("--threads", type=int, metavar="N", help="of the backend (default: its choice)")
    add("-o", "--out", type=Path, required=True, metavar="DIR", help="for the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the table and the plot; returns the exit code."""
    args = parse(argv)
    try:
        originals = load_originals(args.hr)
        with Upscaler(args.engine, threads=args.threads) as up:
            found = measure(up, originals, args.degrade, args.weights, args.steps)
            title = f"Fidelity of {up.manifest.name}, {args.degrade}, mean of {len(originals)} images"
    except MoesrError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fidelity.md").write_text(page(title, found), encoding="utf-8")
    if plt := figures.pyplot():
        draw(plt, found, args.out / "fidelity.png")
    else:
        print(figures.MATPLOTLIB_MISSING, file=sys.stderr)
    print(page(title, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
