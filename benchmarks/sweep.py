"""Measure the effect of single settings of an engine on your own images (StableSR's Tables 3, 4 and 6).

  python benchmarks/sweep.py --engine DIR --hr FOLDER --fidelity 0 0.25 0.5 0.75 1
  python benchmarks/sweep.py --engine DIR --lr FOLDER --guidance 1 2.5 5 7.5
  python benchmarks/sweep.py --engine DIR --hr FOLDER --start-step 0 5 10 15

Originals (--hr) are degraded and then compared with the results. For images without originals (--lr), only
measures that need no original are computed. Settings are swept one at a time; a setting with a single value
is held at it, and the others have their defaults. A setting without values is swept over the paper's values;
without any setting, all settings of the paper that the engine has are swept. The output directory gets
SETTING.md and SETTING.csv, a table like the paper's that starts with bicubic; SETTING_IMAGE.png, the results
side by side; and with originals SETTING.png, PSNR against sharpness.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchlib.missing_extra  # noqa: F401
import numpy as np
from benchlib import (
    figures,
    metrics,
    perceptual,
)
from benchlib.image_pairs import DEGRADATIONS, degrade, load_images, load_originals
from benchlib.origin import origin_line
from benchlib.program import print_page
from benchlib.tables import SECONDS, Record, csv_text, markdown, means
from quality import BICUBIC, HR, Upscale
from tqdm import tqdm

from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import UsageError
from moesr.runtime.images.color import COLOR_FIXES
from moesr.runtime.images.resize import imresize
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.runtime.upscaler import Upscaler


@dataclass(frozen=True)
class Sweep:
    """One setting: its title with the paper's table, the format of its values, and the values to sweep."""

    title: str
    label: str
    values: tuple[float | str, ...]


SWEEPS = {
    "fidelity": Sweep("Fidelity (Table 4)", "w = {:g}", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "color_fix": Sweep("Color correction (Table 3)", "{}", ("none", "adain", "wavelet")),
    "guidance": Sweep("Guidance (Table 6)", "s = {:g}", (1.0, 2.5, 5.0, 7.5)),
    "start_step": Sweep("Start step", "from step {}", (0, 5, 10, 15)),
}
"""The settings by the names of `Upscaler`'s options."""

ON_REQUEST = ("start_step",)
"""Settings that are swept only if they are named, because no table of the papers has them."""


@dataclass(frozen=True)
class Case:
    """An image to super-resolve, uint8 [h, w, 3], and its original if there is one."""

    name: str
    lr: np.ndarray
    hr: np.ndarray | None


def cases(args: argparse.Namespace, scale: int) -> list[Case]:
    """Load the images that the arguments name."""
    if args.lr:
        return [Case(name, image, None) for name, image in load_images(args.lr).items()]
    if DEGRADATIONS[args.degrade] != scale:
        raise UsageError(
            f"--degrade {args.degrade} does not fit an engine that upscales by {scale}; choose a degradation "
            "of that scale"
        )
    return [Case(n, degrade(hr, args.degrade, n), hr) for n, hr in load_originals(args.hr).items()]


def wanted(args: argparse.Namespace, manifest: Manifest) -> dict[str, tuple[float | str, ...]]:
    """Return the requested settings (or all) and their values; UsageError if the engine lacks one."""
    given = {name: tuple(values) for name in SWEEPS if (values := getattr(args, name)) is not None}
    lacking = {}
    if DECODER not in manifest.graphs or "fidelity" not in {s.name for s in manifest.graphs[DECODER].inputs}:
        lacking["fidelity"] = "its decoder takes no LR features"
    if not manifest.guided:
        lacking["guidance"] = "it knows no negative prompt"
    for name in lacking.keys() & given.keys():
        raise UsageError(f"--{name}: {manifest.name} has none, {lacking[name]}; leave it out")
    names = given or {name: () for name in SWEEPS if name not in lacking and name not in ON_REQUEST}
    return {name: given.get(name) or SWEEPS[name].values for name in names}


def methods(
    up: Upscaler, option: str, values: Sequence[float | str], fixed: Mapping[str, Any]
) -> dict[str, Upscale]:
    """Return bicubic and the engine with each value of a setting, by their labels in tables and pictures."""
    scale, label = up.manifest.scale, SWEEPS[option].label

    def bicubic(lr: np.ndarray) -> np.ndarray:
        return imresize(lr, lr.shape[0] * scale, lr.shape[1] * scale)

    def with_value(value: float | str) -> Upscale:
        options = {**fixed, option: value}
        return lambda lr: up(lr, **options)

    return {BICUBIC: bicubic, **{label.format(value): with_value(value) for value in values}}


def score(
    case: Case, scale: int, upscale: Mapping[str, Upscale], learned: Mapping[str, Any]
) -> Iterator[tuple[Record, np.ndarray]]:
    """Yield the record and the result of every method on one image."""
    for method, run in upscale.items():
        started = time.perf_counter()
        sr = run(case.lr)
        values = {SECONDS: time.perf_counter() - started, **perceptual.scores(learned, sr, case.hr)}
        if case.hr is not None:
            values |= metrics.scores(sr, case.hr, scale)
            values[metrics.SHARPNESS] = metrics.sharpness(sr, case.hr, scale)
        yield Record(case.name, method, values), sr


def sweep(
    up: Upscaler,
    option: str,
    values: Sequence[float | str],
    fixed: Mapping[str, Any],
    images: Sequence[Case],
    learned: Mapping[str, Any],
    args: argparse.Namespace,
) -> str:
    """Sweep one setting over all images and write the files; returns the Markdown page."""
    upscale, scale = methods(up, option, values, fixed), up.manifest.scale
    records: list[Record] = []
    for case in tqdm(images, desc=option, unit="image", disable=None):
        scored, results = zip(*score(case, scale, upscale, learned), strict=True)
        records += scored
        enlarged = case.lr.repeat(scale, axis=0).repeat(scale, axis=1)
        panels = {"LR": enlarged, **dict(zip(upscale, results, strict=True))}
        panels |= {} if case.hr is None else {HR: case.hr}
        figures.contact_sheet(panels, args.out / f"{option}_{Path(case.name).stem}.png")
    averaged = means(records)
    page = f"{preamble(up, option, fixed, args)}{markdown(records, averaged)}"
    (args.out / f"{option}.md").write_text(page, encoding="utf-8")
    (args.out / f"{option}.csv").write_text(csv_text(records, averaged), encoding="utf-8")
    if not args.lr and (plt := figures.pyplot()):
        draw(plt, averaged, args.out / f"{option}.png")
    return page


def draw(plt: Any, averaged: Sequence[Record], path: Path) -> None:
    """Plot PSNR against sharpness: the values of a setting joined by a line, and bicubic as a point."""
    figure, axis = plt.subplots(figsize=(4.4, 3.3), layout="constrained")
    places = {r.method: (r.values[metrics.SHARPNESS], r.values["psnr"]) for r in averaged}
    axis.plot(*zip(*(at for name, at in places.items() if name != BICUBIC), strict=True), "o-", ms=5)
    axis.plot(*places[BICUBIC], "s", ms=5, color="grey")
    for i, (name, at) in enumerate(places.items()):  # labels alternate above and below
        axis.annotate(name, at, (4, 4 if i % 2 else -12), textcoords="offset points", fontsize=8)
    axis.set(xlabel="sharpness (1: the original's)", ylabel="PSNR, dB")
    axis.margins(0.2)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def preamble(up: Upscaler, option: str, fixed: Mapping[str, Any], args: argparse.Namespace) -> str:
    """Return the Markdown text above a table: images, settings and origin."""
    m, source = up.manifest, args.lr or f"{args.hr}, {args.degrade}"
    settings = {"steps": m.steps, "sampler": m.sampler} | {k: v for k, v in fixed.items() if v is not None}
    held = ", ".join(f"{name} {value}" for name, value in settings.items())
    return (
        f"# {SWEEPS[option].title}: {m.name} ({m.precision})\n\n"
        f"Images: {source}. Held: {held}. {up.backend.name}.\n"
        f"{origin_line()}\n"
        f"PSNR and SSIM on luma without a border of {m.scale} pixels.\n\n"
    )


def benchmark(args: argparse.Namespace) -> str:
    """Sweep all requested settings; returns the Markdown pages."""
    with Upscaler(args.engine, threads=args.threads) as up:
        images, settings = cases(args, up.manifest.scale), wanted(args, up.manifest)
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{args.out}: cannot be made ({error.strerror}); choose another -o") from error
        # One small image through every expert, so that all graphs are loaded before the timing starts.
        up(np.zeros((8, 8, 3), np.uint8), steps=len(up.manifest.experts), seed=args.seed)
        learned = perceptual.load()
        learned.pop(perceptual.FID, None)  # not meaningful for few images
        fixed = {name: getattr(args, name) for name in ("steps", "sampler", "seed")}
        fixed |= {name: values[0] for name, values in settings.items() if len(values) == 1}
        swept = {name: values for name, values in settings.items() if len(values) > 1}
        if not swept:
            raise UsageError("every setting has one value: nothing to sweep; give several values, or none")
        pages = [sweep(up, name, values, fixed, images, learned, args) for name, values in swept.items()]
        return "\n".join(pages)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--engine", type=Path, metavar="DIR", help="engine directory (default: the bundled demo engine)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--hr", default="demo", metavar="DIR", help="originals (default: three photographs)")
    source.add_argument("--lr", metavar="DIR", help="images to enlarge, without originals")
    add("--degrade", choices=DEGRADATIONS, default="x4-bicubic", help="how LR is made (default %(default)s)")
    add("--fidelity", type=float, nargs="*", metavar="W", help="weights of the LR features, 0 to 1")
    add("--color-fix", choices=COLOR_FIXES, nargs="*", help="corrections towards the LR image's colors")
    add("--guidance", type=float, nargs="*", metavar="S", help="guidance scales; 1 means no guidance")
    add("--start-step", type=int, nargs="*", metavar="K", help="steps that are left out at the beginning")
    add("--steps", type=int, metavar="N", help="sampling steps (default: the engine's)")
    add("--sampler", choices=SAMPLERS, help="sampler (default: the engine's)")
    add("--seed", type=int, default=42, help="seed of the noise (default %(default)s)")
    add("--threads", type=int, metavar="N", help="threads of the backend (default: its choice)")
    out = Path("benchmarks/results/sweep")
    add("-o", "--out", type=Path, default=out, metavar="DIR", help="output directory (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return print_page(benchmark, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
