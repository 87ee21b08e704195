"""Lines that say, before work on an image starts, what time, memory and disk space it is expected to take."""

from __future__ import annotations

from collections.abc import Sequence

from moesr.runtime.system.memory import readable
from moesr.runtime.upscaler import Forecast

LONG_S = 60.0
"""Images that are expected to take at least so many seconds have a line of their own."""


def line(name: str, target: tuple[int, int], passes: Sequence[Forecast], others: int = 0) -> str:
    """Return the line for an image whose result has the size `target` (height, width).

    `passes` are the estimates of its passes through the engine. With `others`, the time is also given for so
    many further inputs, if they are like this one.
    """
    most = max(passes, key=lambda forecast: forecast.memory_bytes)
    free = "" if most.free_bytes is None else f" ({readable(most.free_bytes)} are free)"
    disk = max(forecast.disk_bytes for forecast in passes)
    files = f", {readable(disk)} of temporary files" if disk else ""
    seconds = total(passes)
    needs = "" if seconds is None else f"about {duration(seconds)}, "
    needs += f"{readable(most.memory_bytes)} of memory{free}{files}"
    text = f"{name}: {target[1]}x{target[0]} pixels; expected: {needs}"
    if seconds is None:
        text += "; the time is estimated after the first tiles"
    elif others:
        text += f"; all {others + 1} inputs, if they are alike, {duration(seconds * (others + 1))}"
    return text


def is_long(passes: Sequence[Forecast]) -> bool:
    """Return True if an image has a line of its own, because it takes long or needs temporary files."""
    seconds = total(passes)
    return any(forecast.disk_bytes for forecast in passes) or (seconds is not None and seconds >= LONG_S)


def total(passes: Sequence[Forecast]) -> float | None:
    """Return the seconds of all passes; None if they are not known."""
    known = [forecast.seconds for forecast in passes if forecast.seconds is not None]
    return sum(known) if known else None


def duration(seconds: float) -> str:
    """Format a time, such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
