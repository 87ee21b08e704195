"""`moesr-decode --reconstruct`: how close images come to themselves when they are encoded and decoded.

Every image is decoded with and without the refinement network and compared with the original (MoE-SR,
appendix D and Table 9), also by the correlation of their spectra (appendix C.2 and Fig. 10). The measures are
those of `images/measures.py`, on luma of 8-bit images. The latent is the mean of the posterior, so the
figures can be repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moesr.runtime.autoencoder import Autoencoder
from moesr.runtime.cli import inputs
from moesr.runtime.cli.batch import account_of, summary
from moesr.runtime.cli.decode_batch import DecodeOptions, pixels_of
from moesr.runtime.cli.inputs import is_directory
from moesr.runtime.cli.progress import Display
from moesr.runtime.cli.reconstruct_figure import Reconstruction, figure
from moesr.runtime.cli.report import Entry, Report
from moesr.runtime.errors import InputError, MoesrError, OutputError, UsageError
from moesr.runtime.images import measures, reading
from moesr.runtime.images.planes import split, to_unit
from moesr.runtime.images.resize import reflect_pad
from moesr.runtime.system import console
from moesr.runtime.system.files import check_writable, reason, write_atomically

TABLE, FIGURE = "reconstruction.md", "reconstruction.png"
SHOWN = 4
"""The figure shows at most so many images."""

WITHOUT, WITH = "without refinement", "with refinement"

log = logging.getLogger("moesr")


def run(vae: Autoencoder, paths: Sequence[Path], output: str | None, how: DecodeOptions) -> int:
    """Measure all images, print the table, and return the highest of their exit codes.

    With `output`, a directory, the table and a figure are written there. Raises UsageError if there are no
    images or the engine has no encoder, and OutputError if a file is in the way.
    """
    if not vae.encodes:
        raise UsageError(f"{vae.manifest.name} has no encoder, which --reconstruct needs")
    place = _place(output, how.force)
    listing = inputs.find(paths, recursive=how.recursive, ignored=place)
    if not (listing.inputs or listing.failed):
        raise UsageError(f"no images in {', '.join(map(str, paths))}")
    report, record = Report(how.log, how.json_progress), how.record(vae)
    display = Display(len(listing.inputs), quiet=how.quiet, as_events=how.json_progress)
    problems: list[tuple[Path, Exception]] = list(listing.failed)
    found: list[Reconstruction] = []
    rows: list[tuple[str, dict[str, tuple[float, float, float]]]] = []
    for position, given in enumerate(listing.inputs, 1):
        display.show(position, given.path.name, "reconstructing", (position - 1) / len(listing.inputs))
        try:
            one = reconstructed(vae, given.path)
        except (MoesrError, MemoryError, OSError) as error:
            problems.append((given.path, error))
            continue
        rows.append((one.name, one.scores))
        found += [one] if len(found) < SHOWN else []
        report.write(Entry(str(given.path)).line("done", record))
    display.close(True)
    code = 0
    for path, error in problems:
        text, its = account_of(error, str(path))
        log.error("%s", text)
        report.write(Entry(str(path)).line("failed", record, text))
        code = max(code, its)
    if rows:
        _show(rows, found, place)
    summary({"done": len(rows), "failed": len(problems)})
    return code


def _place(output: str | None, force: bool) -> Path | None:
    """Return the directory for table and figure; OutputError if one of them exists, unless `force`."""
    if output is None:
        return None
    place = Path(output)
    if place.exists() and not is_directory(place):
        raise UsageError(f"{place}: is a file, expected a directory for {TABLE} and {FIGURE}")
    for name in (TABLE, FIGURE):
        if (place / name).exists() and not force:
            raise OutputError(f"{place / name}: exists; replace it with --force, or name another directory")
    check_writable(place)
    return place


def reconstructed(vae: Autoencoder, path: Path) -> Reconstruction:
    """Encode and decode an image file, and measure the results."""
    pixels = split(reading.load(path).pixels).rgb
    height, width = pixels.shape[:2]
    if min(height, width) < measures.WINDOW:
        raise InputError(f"{path}: is {width}x{height} pixels, SSIM needs {measures.WINDOW} per side")
    unit = to_unit(pixels, np.empty(pixels.shape, np.float32)).transpose(2, 0, 1)
    sides = [-(-side // vae.factor) * vae.factor for side in (height, width)]
    latent = vae.encode(reflect_pad(unit, sides[0], sides[1])[0])
    kinds = {WITHOUT: False, WITH: True} if vae.refines else {WITHOUT: True}
    decoded = {name: vae.decode(latent, refined=refined) for name, refined in kinds.items()}
    images = {name: pixels_of(image[:, :height, :width]) for name, image in decoded.items()}
    original = pixels_of(unit)
    want = measures.luma(original)
    scores = {}
    for name, image in images.items():
        plane = measures.luma(image)
        correlation = measures.spectrum_correlation(plane, want)
        scores[name] = measures.psnr(plane, want), measures.ssim(plane, want), correlation
    return Reconstruction(path.name, original, images, scores)


def _show(
    rows: Sequence[tuple[str, dict[str, tuple[float, float, float]]]],
    found: Sequence[Reconstruction],
    place: Path | None,
) -> None:
    """Print the table; with `place` write it there together with the figure."""
    lines = table(rows)
    for line in lines:
        console.say(line)
    if place is None:
        return
    try:
        with write_atomically(place / TABLE) as stream:
            stream.write(("\n".join(lines) + "\n").encode())
        with write_atomically(place / FIGURE) as stream:
            figure(found).save(stream, "PNG")
    except OSError as error:
        raise OutputError(f"{place}: cannot be written to: {reason(error)}") from error
    console.say(f"wrote {place / TABLE} and {place / FIGURE}")


def table(rows: Sequence[tuple[str, dict[str, tuple[float, float, float]]]]) -> list[str]:
    """Return a Markdown table of the measures, with their means in the last row."""
    kinds = list(rows[0][1])
    heads = [f"{measure} {kind}" for measure in ("PSNR (dB)", "SSIM", "spectrum ρ") for kind in kinds]
    lines = [f"| image | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    means = {kind: np.mean([scores[kind] for _, scores in rows], axis=0) for kind in kinds}
    for name, scores in [*rows, *([("mean", means)] if len(rows) > 1 else [])]:
        cells = [f"{scores[kind][i]:.{2 if i == 0 else 4}f}" for i in range(3) for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
