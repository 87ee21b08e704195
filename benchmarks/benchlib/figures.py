"""Pictures of the quality benchmark: contact sheets, log spectra and quality against time."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchlib.metrics import measured_luma
from moesr.runtime.images.measures import log_spectrum, spectrum_correlation

PANEL_PX = 512  # a larger image is shown by its centre
LABEL_PX = 28
MATPLOTLIB_MISSING = "no spectra and no plot: matplotlib is not installed; pip install 'moesr[bench]'"


@dataclass(frozen=True)
class Point:
    """One method in the plot: its label, mean seconds per image and mean of the measure."""

    label: str
    seconds: float
    value: float


def contact_sheet(panels: Mapping[str, np.ndarray], path: Path) -> None:
    """Save uint8 images [H, W, 3] of one size side by side under their labels; large ones are cropped."""
    crops = {label: _centre(image) for label, image in panels.items()}
    height, width = next(iter(crops.values())).shape[:2]
    sheet = Image.new("RGB", (width * len(crops), height + LABEL_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LABEL_PX // 2)
    for i, (label, image) in enumerate(crops.items()):
        sheet.paste(Image.fromarray(image), (i * width, LABEL_PX))
        draw.text((i * width + 6, LABEL_PX // 2), label, fill="black", font=font, anchor="lm")
    sheet.save(path)


def _centre(image: np.ndarray) -> np.ndarray:
    top, left = (max(0, side - PANEL_PX) // 2 for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + PANEL_PX, left : left + PANEL_PX])


def pyplot() -> Any:
    """Return Matplotlib's pyplot with a backend that draws to files; None if it is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return None


def spectra(plt: Any, panels: Mapping[str, np.ndarray], hr: np.ndarray, scale: int, path: Path) -> None:
    """Save the log spectra of uint8 images next to the original's, with their correlations (paper Fig. 10).

    A dashed square marks the frequency band of the LR image; "HF" is the correlation outside its inscribed
    circle.
    """
    y_hr = measured_luma(hr, scale)
    planes = {"HR": y_hr, **{label: measured_luma(image, scale) for label, image in panels.items()}}
    figure, axes = plt.subplots(1, len(planes), figsize=(3.2 * len(planes), 3.7), layout="constrained")
    limits = {"vmin": 0.0, "vmax": float(np.quantile(log_spectrum(y_hr), 0.999))}
    for axis, (label, plane) in zip(axes, planes.items(), strict=True):
        axis.imshow(log_spectrum(plane), cmap="viridis", extent=(-0.5, 0.5, -0.5, 0.5), **limits)
        edge = 0.5 / scale
        axis.add_patch(
            plt.Rectangle((-edge, -edge), 2 * edge, 2 * edge, fill=False, ls="--", lw=0.8, ec="white")
        )
        axis.set(title=label, xticks=[], yticks=[])
        if label != "HR":
            whole = spectrum_correlation(plane, y_hr)
            high = spectrum_correlation(plane, y_hr, above=edge)
            axis.set_xlabel(f"ρ {whole:.4f}   HF {high:.4f}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def quality_against_time(plt: Any, points: Sequence[tuple[str, Sequence[Point]]], path: Path) -> None:
    """Save one plot per measure (heading and points): its mean against mean seconds per image, on a log axis.

    Points whose labels differ only in the last word (the number of steps) are joined by a line.
    """
    across = min(3, len(points))
    down = -(-len(points) // across)
    size = (4.4 * across, 3.3 * down)
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(points) :]:
        axis.axis("off")
    for axis, (heading, marks) in zip(axes.flat, points, strict=False):
        series: dict[str, list[Point]] = {}
        for m in marks:
            series.setdefault(m.label.rpartition(" ")[0] or m.label, []).append(m)
        for i, (name, own) in enumerate(series.items()):
            axis.plot([m.seconds for m in own], [m.value for m in own], "o-", ms=5, label=name)
            for m in own:
                text, place = m.label.removeprefix(name).strip(), (0, 5 if i % 2 else -12)
                axis.annotate(text, (m.seconds, m.value), place, textcoords="offset points", fontsize=8)
        axis.set(xscale="log", xlabel="seconds per image", title=heading)
        seconds = [m.seconds for m in marks]
        wide = max(seconds) > 100 * min(seconds)
        axis.xaxis.set_major_locator(plt.LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(plt.NullFormatter())
        axis.margins(x=0.25, y=0.15)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
