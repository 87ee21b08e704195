"""Result sizes that users ask for: a scale or an exact size, reached in one or two passes of the engine."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass

from moesr.runtime.errors import InputError

MAX_PASSES = 2
LEAST_SCALE, MOST_SCALE = 0.1, 64.0
MAX_SIDE_PX = 1_000_000


@dataclass(frozen=True)
class Size:
    """A scale, or a width and a height, one of which may be None to keep the proportions of the input."""

    scale: float | None = None
    width: int | None = None
    height: int | None = None

    @property
    def name(self) -> str:
        """Return the size as in a file name: "x2.5", "800x600", "w800" or "h600"."""
        if self.scale is not None:
            return f"x{self.scale:g}"
        if self.width and self.height:
            return f"{self.width}x{self.height}"
        return f"w{self.width}" if self.width else f"h{self.height}"

    def recorded(self) -> dict[str, float | str]:
        """Return the setting as results record it: {"scale": 2.5} or {"size": "800x600"}."""
        if self.scale is not None:
            return {"scale": self.scale}
        return {"size": f"{self.width or ''}x{self.height or ''}"}

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the result of an image."""
        if self.scale is not None:
            return _rounded(height * self.scale), _rounded(width * self.scale)
        if self.width and self.height:
            return self.height, self.width
        if self.width:
            return _rounded(height * self.width / width), self.width
        assert self.height
        return self.height, _rounded(width * self.height / height)


def scale_argument(text: str) -> Size:
    """Return the size for `--scale`, such as "2" or "2.5"."""
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not LEAST_SCALE <= scale <= MOST_SCALE:
        raise argparse.ArgumentTypeError(
            f"is {text!r}, expected a number from {LEAST_SCALE:g} to {MOST_SCALE:g}, such as 2.5"
        )
    return Size(scale=scale)


def size_argument(text: str) -> Size:
    """Return the size for `--size`, such as "1920x1080", "1920x" or "x1080"."""
    found = re.fullmatch(r"([1-9]\d{0,6})?[xX]([1-9]\d{0,6})?", text.strip(), re.ASCII)
    sides = [int(side) for side in found.groups() if side] if found else []
    if not found or not sides or max(sides) > MAX_SIDE_PX:
        raise argparse.ArgumentTypeError(
            f"is {text!r}, expected WIDTHxHEIGHT in pixels, such as 1920x1080, or one of the two, such as "
            "1920x or x1080"
        )
    width, height = (int(side) if side else None for side in found.groups())
    return Size(width=width, height=height)


def between(source: tuple[int, int], target: tuple[int, int], scale: int) -> tuple[int, int] | None:
    """Return the size to which the first pass is resampled before a second one; None if one pass is enough.

    Sizes are (height, width). The second pass then reaches `target`, or a little more. InputError is raised
    if two passes are not enough.
    """
    if all(s * scale >= t for s, t in zip(source, target, strict=True)):
        return None
    if any(s * scale**MAX_PASSES < t for s, t in zip(source, target, strict=True)):
        height, width = source
        most = scale**MAX_PASSES
        raise InputError(
            f"{width}x{height} pixels cannot become {target[1]}x{target[0]}: this engine enlarges at most "
            f"{most} times, in {MAX_PASSES} passes; ask for {width * most}x{height * most} or less"
        )
    middle = [min(-(-t // scale), s * scale) for s, t in zip(source, target, strict=True)]
    return middle[0], middle[1]


def _rounded(side: float) -> int:
    return max(1, math.floor(side + 0.5))
