"""Tables of scores as Markdown and CSV, with one row per method and one column per measure."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchlib import metrics, perceptual

SECONDS = "seconds"
HEADINGS = {
    **metrics.COLUMNS,
    **metrics.DIFFUSION,
    metrics.NIQE: "NIQE (BasicSR)↓",
    metrics.SHARPNESS: "sharpness",
    **perceptual.HEADINGS,
    SECONDS: "seconds",
}
"""All columns that a table can have, in order."""

_DECIMALS: dict[str, int] = dict.fromkeys(
    ("psnr", "musiq", "seeds", "high_power", "latent_share", metrics.NIQE, perceptual.FID, SECONDS), 2
)  # 4 for the others
_MEAN, _MEDIAN = "mean", "median"


@dataclass(frozen=True)
class Record:
    """Scores of a method on an image, by column name."""

    image: str
    method: str
    values: Mapping[str, float]


def means(records: Sequence[Record]) -> list[Record]:
    """Return one record per method, in order of appearance, with the means over the images."""
    averaged = []
    for method in dict.fromkeys(r.method for r in records):
        own = [r.values for r in records if r.method == method]
        averaged.append(Record(_MEAN, method, {c: math.fsum(v[c] for v in own) / len(own) for c in own[0]}))
    return averaged


def medians(records: Sequence[Record]) -> list[Record]:
    """Return one record per method with the medians over the images; NaN values are left out."""
    rated = []
    for method in dict.fromkeys(r.method for r in records):
        own = [r.values for r in records if r.method == method]
        columns = {c: [v[c] for v in own if not math.isnan(v[c])] for c in own[0]}
        rated.append(
            Record(_MEDIAN, method, {c: statistics.median(v) if v else math.nan for c, v in columns.items()})
        )
    return rated


def markdown(records: Sequence[Record], averaged: Sequence[Record]) -> str:
    """Return the tables of means and medians and the table of all images."""
    images = len({r.image for r in records})
    return "\n".join(
        [
            f"Mean of {images} image{'s' if images > 1 else ''}\n",
            _table(averaged, with_image=False),
            *(["\nMedian\n", _table(medians(records), with_image=False)] if images > 2 else []),
            "\nEach image\n",
            _table(records, with_image=True),
            "",
        ]
    )


def _table(records: Sequence[Record], with_image: bool) -> str:
    columns = _columns(records)
    head = [*(["Image"] if with_image else []), "Method", *(HEADINGS[c] for c in columns)]
    body = [
        [*([r.image] if with_image else []), r.method, *(_number(c, r.values.get(c)) for c in columns)]
        for r in records
    ]
    return grid(head, body, names=1 + with_image)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Format cells as a Markdown table; all columns but the first `names` are aligned right."""
    rule = [*["---"] * names, *["---:"] * (len(head) - names)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def _columns(records: Sequence[Record]) -> list[str]:
    return [c for c in HEADINGS if any(c in r.values for r in records)]


def _number(column: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.{_DECIMALS.get(column, 4)}f}"


def csv_text(records: Sequence[Record], averaged: Sequence[Record]) -> str:
    """Return all records and then the means (with "mean" as the image) as CSV with full precision."""
    columns = _columns([*records, *averaged])
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["image", "method", *columns])
    for r in [*records, *averaged]:
        writer.writerow([r.image, r.method, *(r.values.get(c, "") for c in columns)])
    return stream.getvalue()
