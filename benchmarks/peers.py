"""Compare an x4 engine with bicubic interpolation and Real-ESRGAN x4plus on the same inputs.

  python benchmarks/peers.py --hr Set14 --niqe niqe_pris_params.npz -o benchmarks/results/peers

Every original is reduced by MATLAB's bicubic. The engine runs with its default settings, and Real-ESRGAN with
ncnn on the same number of threads. The methods alternate on every image, so that other load on the machine
affects all of them. The output directory gets peers.md, peers.csv, and for the first images peers_*.png with
LR, bicubic, the engine, Real-ESRGAN and the original side by side.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import benchlib.missing_extra  # noqa: F401
import numpy as np
from benchlib import figures, metrics, niqe
from benchlib.image_pairs import degrade, load_originals
from benchlib.machine import usable_cores
from benchlib.origin import origin_line
from benchlib.program import print_page
from benchlib.realesrgan import SCALE, RealESRGAN
from benchlib.tables import SECONDS, Record, csv_text, grid, markdown, means
from tqdm import tqdm

from moesr.runtime.errors import UsageError
from moesr.runtime.images.resize import imresize
from moesr.runtime.loop.settings import takes_fidelity
from moesr.runtime.upscaler import Upscaler

BICUBIC, PEER, ORIGINAL = "bicubic", "Real-ESRGAN x4plus", "original"
Upscale = Callable[[np.ndarray], np.ndarray]  # uint8 LR [h, w, 3] -> uint8 SR [4 h, 4 w, 3]


def bicubic(lr: np.ndarray) -> np.ndarray:
    """Enlarge by MATLAB's bicubic interpolation."""
    return imresize(lr, lr.shape[0] * SCALE, lr.shape[1] * SCALE)


def compare(
    originals: dict[str, np.ndarray],
    methods: dict[str, Upscale],
    pristine: niqe.Pristine | None,
    out: Path,
    pictures: int,
) -> list[Record]:
    """Score every method on every image, alternating the methods, and draw the first images."""
    records = []
    for number, (name, hr) in enumerate(tqdm(originals.items(), unit="image", disable=None)):
        lr = degrade(hr, "x4-bicubic", name)
        panels = {"LR": lr.repeat(SCALE, axis=0).repeat(SCALE, axis=1)}
        for method, run in methods.items():
            started = time.perf_counter()
            panels[method] = sr = run(lr)
            seconds = time.perf_counter() - started
            values = {**metrics.scores(sr, hr, SCALE), SECONDS: seconds}
            if pristine:
                values[metrics.NIQE] = niqe.niqe(sr, pristine)
            records.append(Record(name, method, values))
        if number < pictures:
            figures.contact_sheet({**panels, ORIGINAL: hr}, out / f"peers_{Path(name).stem}.png")
        if pristine:
            records.append(Record(name, ORIGINAL, {metrics.NIQE: niqe.niqe(hr, pristine)}))
    return records


def price(records: Sequence[Record], originals: dict[str, np.ndarray]) -> str:
    """Return a table of the seconds per output megapixel of each method."""
    megapixels = sum(hr.shape[0] * hr.shape[1] for hr in originals.values()) / 1e6
    rows = []
    for method in dict.fromkeys(r.method for r in records if SECONDS in r.values):
        total = sum(r.values[SECONDS] for r in records if r.method == method)
        rows.append([method, f"{total / megapixels:.1f}"])
    return grid(["Method", "seconds per megapixel"], rows)


def benchmark(args: argparse.Namespace) -> str:
    """Compare, write the files and return the Markdown page."""
    pristine = None if args.niqe is None else niqe.load(args.niqe)
    originals = dict(list(load_originals(args.hr).items())[: args.count])
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{args.out}: cannot be made ({error.strerror}); choose another -o") from error
    with Upscaler(args.engine, threads=args.threads) as up:
        m = up.manifest
        if m.scale != SCALE:
            raise UsageError(
                f"{m.name} upscales by {m.scale}, Real-ESRGAN x4plus by {SCALE}; name an x4 engine"
            )
        peer = RealESRGAN(args.threads)
        methods: dict[str, Upscale] = {BICUBIC: bicubic, m.name: up, PEER: peer}
        for run in methods.values():
            run(np.zeros((32, 32, 3), np.uint8))  # loads all graphs before the timing starts
        records = compare(originals, methods, pristine, args.out, args.pictures)
        fidelity = f", fidelity {m.fidelity:g}" if takes_fidelity(m) else ""
        settings = f"{m.sampler}, {m.steps} steps{fidelity}, {up.backend.name}"
    averaged = means(records)
    page = (
        f"# {m.name} beside its peers\n\n{origin_line()}\n\nx4 of {args.hr} reduced by MATLAB's bicubic, "
        f"{len(originals)} images. {m.name} at its defaults ({settings}), Real-ESRGAN by ncnn; "
        f"{args.threads} threads each, in turns.\nPSNR and SSIM on luma without a border of {SCALE} pixels; "
        "HF power is that of the spectrum above the LR image's Nyquist frequency as a share of the "
        "original's.\n\n"
        f"{price(records, originals)}\n\n{markdown(records, averaged)}"
    )
    (args.out / "peers.md").write_text(page, encoding="utf-8")
    (args.out / "peers.csv").write_text(csv_text(records, averaged), encoding="utf-8")
    return page


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--engine", metavar="DIR", help="engine directory (default: the bundled demo engine)")
    add("--hr", default="demo", metavar="DIR", help="originals (default: three photographs)")
    add("--count", type=int, metavar="N", help="use only the first N originals (default: all)")
    add("--pictures", type=int, default=4, metavar="N", help="images to draw (default %(default)s)")
    add("--niqe", type=Path, metavar="FILE", help="niqe_pris_params.npz of BasicSR, to measure NIQE")
    add("--threads", type=int, default=usable_cores(), metavar="N", help="CPU threads (default: all cores)")
    out = Path("benchmarks/results/peers")
    add("-o", "--out", type=Path, default=out, metavar="DIR", help="output directory (default %(default)s)")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    return print_page(benchmark, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
