"""Measure an engine's quality on images with known originals, as tables and figures like the paper's.

Every original is degraded, super-resolved by bicubic interpolation and with each sampler and number of steps,
and the results are compared with the original. The output directory gets quality.md and quality.csv (like the
paper's Tables 1-5), sheet_*.png (LR, bicubic, SR and HR side by side), spectra_*.png (as Fig. 10) and
quality_vs_time.png. Sheets and spectra show the first sampler with its first number of steps.

Three columns show the effect of the diffusion: the power of the spectrum above the LR image's Nyquist
frequency relative to the original's (bicubic x4 has about 0.04), the PSNR between the results of two seeds
(lower means more random detail), and the share of that power that is lost with zeros in place of the latent.
`--niqe FILE` adds NIQE with BasicSR's model of pristine photographs, niqe_pris_params.npz.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchlib.missing_extra  # noqa: F401
import numpy as np
from benchlib import (
    figures,
    metrics,
    niqe,
    perceptual,
)
from benchlib.blank_latent import blank_latent
from benchlib.image_pairs import BLIND, DEGRADATIONS, degrade, load_originals
from benchlib.origin import origin_line
from benchlib.program import print_page
from benchlib.tables import HEADINGS, SECONDS, Record, csv_text, markdown, means
from PIL import Image
from tqdm import tqdm

from moesr.runtime.engine.locate import engine_directory
from moesr.runtime.errors import UsageError
from moesr.runtime.images.color import COLOR_FIXES
from moesr.runtime.images.resize import imresize
from moesr.runtime.loop.settings import takes_fidelity
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.runtime.upscaler import Upscaler

BICUBIC, HR = "Bicubic", "HR"
STEPS = [200, 100, 50, 20]  # as in the paper's Table 4
Upscale = Callable[[np.ndarray], np.ndarray]  # uint8 LR [h, w, 3] -> uint8 SR [H, W, 3]


def methods(
    up: Upscaler,
    samplers: Sequence[str],
    steps: Sequence[int],
    seed: int,
    color_fix: str = "adain",
    fidelity: float | None = None,
    reuse: Sequence[int] = (1,),
) -> dict[str, Upscale]:
    """Return the engine with every sampler and number of steps, by the name in the tables.

    With reuse of features, "/ 2" in a name means that every second step is a full one.
    """

    def sampled(sampler: str, count: int, interval: int) -> Upscale:
        options = {"steps": count, "sampler": sampler, "seed": seed, "reuse": interval}
        return lambda lr: up(lr, **options, color_fix=color_fix, fidelity=fidelity)

    return {
        f"{s.upper()} {count}" + (f" / {n}" if n > 1 else ""): sampled(s, count, n)
        for s in samplers
        for count in steps
        for n in reuse
    }


@dataclass(frozen=True)
class Measures:
    """The methods to compare, and the models of further measures besides `metrics.scores`.

    `again` holds the engine's methods with another seed; `blank` is the engine with zeros in place of the
    latent.
    """

    upscale: Mapping[str, Upscale]
    again: Mapping[str, Upscale]
    blank: Upscale | None
    learned: Mapping[str, Any]
    pristine: niqe.Pristine | None

    def score(self, name: str, hr: np.ndarray, lr: np.ndarray) -> tuple[list[Record], dict[str, np.ndarray]]:
        """Run every method on one image; returns the records and the results by method."""
        scale = hr.shape[0] // lr.shape[0]
        blank = None if self.blank is None else self.blank(lr)
        records, results = [], {}
        for method, run in self.upscale.items():
            started = time.perf_counter()
            results[method] = sr = run(lr)
            values = {SECONDS: time.perf_counter() - started, **metrics.scores(sr, hr, scale)}
            if method in self.again and blank is not None:
                values |= metrics.diffusion_scores(sr, self.again[method](lr), blank, scale)
            if self.pristine:
                values[metrics.NIQE] = niqe.niqe(sr, self.pristine)
            records.append(Record(name, method, {**values, **perceptual.scores(self.learned, sr, hr)}))
        return records, results


def draw(stem: str, hr: np.ndarray, lr: np.ndarray, results: Mapping[str, np.ndarray], out: Path) -> None:
    """Draw the contact sheet of one image and, with matplotlib, the spectra: bicubic and the first method."""
    scale = hr.shape[0] // lr.shape[0]
    shown = dict(list(results.items())[:2])
    nearest = lr.repeat(scale, axis=0).repeat(scale, axis=1)
    figures.contact_sheet({"LR": nearest, **shown, "HR": hr}, out / f"sheet_{stem}.png")
    if plt := figures.pyplot():
        figures.spectra(plt, shown, hr, scale, out / f"spectra_{stem}.png")


def run(
    originals: Mapping[str, np.ndarray],
    degradation: str,
    measures: Measures,
    out: Path,
    draws: int = 1,
) -> tuple[list[Record], list[Record]]:
    """Score every image, degraded `draws` times, and draw it once.

    Returns the records and their means (with FID if it is available).
    """
    learned, records = measures.learned, []
    with tempfile.TemporaryDirectory() as scratch:
        sets = ImageSets(Path(scratch))
        cases = [(name, i) for name in originals for i in range(draws)]
        for name, i in tqdm(cases, unit="image", disable=None):
            hr, label = originals[name], f"{name} {i + 1}" if i else name
            lr = degrade(hr, degradation, label)
            scored, results = measures.score(label, hr, lr)
            records += scored
            if i == 0:
                draw(Path(name).stem, hr, lr, results, out)
            if perceptual.FID in learned:
                sets.add(f"{Path(name).stem}_{i}", {**results, HR: hr})
        averaged = means(records)
        if perceptual.FID in learned:
            averaged = [sets.with_fid(r, learned) for r in averaged]
    return records, averaged


@dataclass(frozen=True)
class ImageSets:
    """One directory of images per method, as FID needs them."""

    directory: Path

    def add(self, stem: str, images: Mapping[str, np.ndarray]) -> None:
        """Save one image per method."""
        for method, image in images.items():
            (self.directory / method).mkdir(exist_ok=True)
            Image.fromarray(image).save(self.directory / method / f"{stem}.png")

    def with_fid(self, record: Record, learned: Mapping[str, Any]) -> Record:
        """Return the record of a method's means with its FID against the originals added."""
        value = perceptual.fid(learned, self.directory / record.method, self.directory / HR)
        return Record(record.image, record.method, {**record.values, perceptual.FID: value})


def plot(averaged: Sequence[Record], path: Path) -> None:
    """Plot every measure against time; without matplotlib, print a line to stderr."""
    plt = figures.pyplot()
    if plt is None:
        print(figures.MATPLOTLIB_MISSING, file=sys.stderr)
        return

    def marks(column: str) -> list[figures.Point]:
        return [figures.Point(r.method, r.values[SECONDS], r.values[column]) for r in averaged]

    known = [c for c in HEADINGS if all(math.isfinite(r.values.get(c, math.nan)) for r in averaged)]
    columns = [c for c in known if c != SECONDS]
    figures.quality_against_time(plt, [(HEADINGS[c], marks(c)) for c in columns], path)


def preamble(up: Upscaler, args: argparse.Namespace) -> str:
    """Return the Markdown text above the tables: settings, machine and meaning of the columns."""
    m, backend = up.manifest, up.backend
    times = f", each degraded {args.draws} times" if args.draws > 1 else ""
    fidelity = f"fidelity {m.fidelity if args.fidelity is None else args.fidelity:g}"
    fused = fidelity if takes_fidelity(m) else "no LR fusion"
    threads = f", {args.threads} thread{'s' * (args.threads > 1)}" if args.threads else ""
    return (
        f"# Quality of {m.name} ({m.precision}), {args.degrade}\n\n"
        f"Originals: {args.hr}{times}. Seed {args.seed}, color fix {args.color_fix}, "
        f"{fused}, tile {m.tile} px, checkpoint {m.checkpoint_sha256[:12]}. "
        f"{backend.name} on {backend.options.device}{threads}, {platform.machine()}, "
        f"{os.cpu_count()} logical cores.\n"
        f"{origin_line()}\n"
        f"PSNR and SSIM on luma without a border of {m.scale} pixels; ρ is Spearman's correlation of the log "
        "spectra, HF above the LR image's Nyquist frequency; HF power is the power above it relative to the "
        "original's; latent's share is the fraction of it that is lost with zeros in place of the latent; "
        "seconds are per image, with graphs loaded.\n\n"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--engine", type=Path, metavar="DIR", help="engine directory (default: the bundled demo engine)")
    add("--hr", default="demo", metavar="DIR", help="originals; demo: three photographs (default: demo)")
    add("--degrade", choices=DEGRADATIONS, default="x4-bicubic", help="how LR is made (default %(default)s)")
    add("--draws", type=int, default=1, metavar="N", help="blind: LR images of each original (default 1)")
    add(
        "--steps",
        type=int,
        nargs="+",
        default=[200, 100, 50, 20],
        metavar="N",
        help="(default: 200 100 50 20)",
    )
    add("--reuse", type=int, nargs="+", default=[1], metavar="N", help="(default: 1)")
    add("--sampler", nargs="+", choices=list(SAMPLERS), default=["ddpm"], help="(default: ddpm)")
    add("--color-fix", choices=COLOR_FIXES, default="adain", help="(default: %(default)s)")
    add("--fidelity", type=float, metavar="W", help="weight of LR features, 0 to 1 (default: engine's)")
    add("--niqe", type=Path, metavar="FILE", help="niqe_pris_params.npz of BasicSR, to measure NIQE")
    add("--seed", type=int, default=42, help="seed of the noise (default %(default)s)")
    add("--threads", type=int, metavar="N", help="threads of the backend (default: its choice)")
    out = Path("benchmarks/results/quality")
    add("-o", "--out", type=Path, default=out, metavar="DIR", help="output directory (default %(default)s)")
    return parser.parse_args(argv)


def measures_of(
    args: argparse.Namespace, up: Upscaler, blank: Upscaler, pristine: niqe.Pristine | None
) -> Measures:
    """Build the methods and measures of the arguments; `blank` is the engine with zeros for the latent."""
    scale, kept = up.manifest.scale, (args.color_fix, args.fidelity)

    def bicubic(lr: np.ndarray) -> np.ndarray:
        return imresize(lr, lr.shape[0] * scale, lr.shape[1] * scale)

    own, other = (
        methods(up, args.sampler, args.steps, seed, *kept, args.reuse) for seed in (args.seed, args.seed + 1)
    )
    fewest = len(up.manifest.experts)
    (without,) = methods(blank, ["ddim"], [fewest], args.seed, *kept).values()
    return Measures({BICUBIC: bicubic, **own}, other, without, perceptual.load(), pristine)


def benchmark(args: argparse.Namespace) -> str:
    """Run the whole benchmark and write the files; returns the Markdown page."""
    if args.draws < 1 or (args.draws > 1 and args.degrade not in BLIND):
        raise UsageError("--draws: expected 1 or more, and more than 1 of a blind degradation only")
    originals = load_originals(args.hr)
    pristine = None if args.niqe is None else niqe.load(args.niqe)
    engine = engine_directory(args.engine)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Upscaler(engine, threads=args.threads) as up,
        Upscaler(blank_latent(engine, Path(scratch)), threads=args.threads) as blank,
    ):
        if DEGRADATIONS[args.degrade] != up.manifest.scale:
            raise UsageError(
                f"--degrade {args.degrade} does not fit {up.manifest.name}, which upscales by "
                f"{up.manifest.scale}; choose a degradation of that scale"
            )
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{args.out}: cannot be made ({error.strerror}); choose another -o") from error
        # One small image through every expert, so that all graphs are loaded before the timing starts.
        up(np.zeros((8, 8, 3), np.uint8), steps=len(up.manifest.experts), seed=args.seed)
        measures = measures_of(args, up, blank, pristine)
        records, averaged = run(originals, args.degrade, measures, args.out, args.draws)
        page = preamble(up, args) + markdown(records, averaged)
    plot(averaged, args.out / "quality_vs_time.png")
    (args.out / "quality.md").write_text(page, encoding="utf-8")
    (args.out / "quality.csv").write_text(csv_text(records, averaged), encoding="utf-8")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return print_page(benchmark, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
