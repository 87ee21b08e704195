"""The figure of `moesr-decode --reconstruct`: crops of the images above their spectra (paper, Fig. 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from moesr.runtime.images import measures
from moesr.runtime.images.resize import imresize

CELL, GAP, TEXT = 256, 8, 16  # pixels
LOW, MIDDLE, HIGH = (68, 1, 84), (33, 145, 140), (253, 231, 37)  # colors of weak and strong frequencies


@dataclass(frozen=True)
class Reconstruction:
    """One image: uint8 [H, W, 3], its reconstructions by name, and their measures by name."""

    name: str
    original: np.ndarray
    images: dict[str, np.ndarray]
    scores: dict[str, tuple[float, float, float]]  # PSNR, SSIM, correlation of spectra


def figure(found: Sequence[Reconstruction]) -> Image.Image:
    """Return the figure: two rows per image, with the original first and then its reconstructions."""
    columns = 1 + len(found[0].images)
    height = len(found) * 2 * (CELL + GAP + TEXT) + GAP
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, one in enumerate(found):
        shown = {one.name: one.original, **one.images}
        spectra = {name: measures.log_spectrum(measures.luma(image)) for name, image in shown.items()}
        reference = spectra[one.name]
        low, high = np.quantile(reference, (0.01, 0.999))
        for column, (name, image) in enumerate(shown.items()):
            x, y = GAP + column * (CELL + GAP), GAP + 2 * row * (CELL + GAP + TEXT)
            score = one.scores.get(name)
            text = name[:40] if score is None else f"{name}, {score[0]:.2f} dB"
            _place(sheet, draw, (x, y), _middle(image), text)
            below = "spectrum" if score is None else f"spectrum, rho {score[2]:.4f}"
            colored = _colored((spectra[name] - low) / max(high - low, 1e-9))
            _place(sheet, draw, (x, y + CELL + GAP + TEXT), colored, below)
    return sheet


def _place(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], pixels: np.ndarray, text: str
) -> None:
    picture = Image.fromarray(pixels)
    picture.thumbnail((CELL, CELL))
    sheet.paste(picture, at)
    draw.text((at[0], at[1] + CELL + 1), text.encode("ascii", "replace").decode(), fill="black")


def _middle(image: np.ndarray) -> np.ndarray:
    """Return the middle of an image, at most one cell, so that its pixels are shown as they are."""
    top, left = (max(side - CELL, 0) // 2 for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + CELL, left : left + CELL])


def _colored(values: np.ndarray) -> np.ndarray:
    """Return values of 0 to 1 in colors from purple to yellow: uint8 [H, W, 3], at most one cell."""
    factor = min(CELL / max(values.shape), 1.0)
    sides = [max(round(side * factor), 1) for side in values.shape]
    small = imresize(values.astype(np.float32), *sides) if factor < 1 else values
    small = np.clip(small, 0.0, 1.0)
    stops = np.array([LOW, MIDDLE, HIGH], np.float64)
    channels = [np.interp(small, (0.0, 0.5, 1.0), stops[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
