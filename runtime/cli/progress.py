"""The progress of a run over many images: the fraction of the work done, as a bar, lines or JSON."""

from __future__ import annotations

import time

from tqdm import tqdm

from moesr.runtime.system import console

BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"

EVENT_S = 1.0
"""Seconds between two progress events of `--progress json`."""


class Progress:
    """The fraction of all work that is done, from reports of the upscaler about the images it has begun.

    The work on other images is estimated from their pixels, or, before they are read, from the mean of the
    images that were read. The fraction never decreases.
    """

    def __init__(self, count: int) -> None:
        self.fraction = 0.0
        self.unread = count  # inputs that were not examined yet
        self._begun = self._waiting = self._second = self._second_done = 0  # pixels of inputs
        self._read = 0
        self._first = 0.0  # pixels whose first pass is done

    def read(self, area: int, second: int = 0) -> None:
        """Count an image that was read; `second` is the number of pixels that a second pass will enlarge."""
        self._read += 1
        self._waiting += area
        self._second += second

    def begin(self, area: int) -> None:
        """Count an image that was read before as begun."""
        self._begun += area
        self._waiting -= area

    def drop(self, area: int) -> None:
        """Remove an image that was read and failed before it was begun."""
        self._waiting -= area
        self._read -= 1

    def update(self, done: float, total: float) -> float:
        """Return the fraction, given that `done` of `total` seconds of work on the begun images are done."""
        self._first = done / total * self._begun if total > 0 else 0.0
        return self._advance(self._first + self._second_done)

    def update_second(self, area: int, fraction: float) -> float:
        """Return the fraction, given the share of a second pass over `area` pixels; share 1 ends the pass."""
        if fraction >= 1.0:
            self._second_done += area
            fraction = 0.0
        return self._advance(self._first + self._second_done + fraction * area)

    def _advance(self, pixels: float) -> float:
        known = self._begun + self._waiting + self._second
        if known:
            everything = known * (1 + self.unread / max(self._read, 1))
            self.fraction = max(self.fraction, min(pixels / everything, 1.0))
        return self.fraction


class Display:
    """Shows the progress of a run on stderr: a bar or lines (see `console.bar`), or events of JSON.

    `count` is the number of inputs, which may grow while they are listed.
    """

    def __init__(self, count: int, *, quiet: bool = False, as_events: bool = False) -> None:
        self.count, self._quiet, self._as_events = count, quiet, as_events
        self._bar: tqdm | None = None
        self._began = self._last = time.monotonic()

    def show(self, position: int, name: str, stage: str, fraction: float) -> None:
        """Show that the input at this position is at this stage of the work."""
        if self._as_events and self._quiet:
            return
        if self._as_events:
            now = time.monotonic()
            if now - self._last >= EVENT_S:
                self._last = now
                left = (now - self._began) * (1 - fraction) / fraction if fraction else None
                self._event(position, name, stage, fraction, left)
            return
        text = console.printable(f"{position}/{self.count} {name}")[-40:]
        if self._bar is None:
            self._bar = console.bar(self._quiet, total=1.0, bar_format=BAR, desc=f"{text}: ")
        self._bar.set_description(text, refresh=False)
        self._bar.set_postfix_str(console.printable(stage)[-40:], refresh=False)
        self._bar.update(fraction - self._bar.n)

    def _event(self, position: int, name: str, stage: str, fraction: float, left: float | None) -> None:
        console.event(
            "progress",
            fraction=round(fraction, 4),
            position=position,
            count=self.count,
            input=name,
            stage=stage,
            remaining_s=None if left is None else round(left, 1),
        )

    def close(self, finished: bool) -> None:
        """Complete the bar if the run has `finished`, and leave it on the screen."""
        if self._bar is not None:
            if finished and self._bar.n:
                self._bar.update(1.0 - self._bar.n)
            self._bar.close()
