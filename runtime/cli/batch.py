"""Many image files through one upscaler: read, super-resolved, written and reported."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moesr.runtime.cli.inputs import Input
from moesr.runtime.cli.outputs import OutputPlan, Task, plan
from moesr.runtime.cli.preclean import PreCleaner
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import InputError, MemoryLimitError, MoesrError, UsageError
from moesr.runtime.images import reading, writing
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.reading import LoadedImage
from moesr.runtime.images.resize import imresize
from moesr.runtime.loop.settings import resolve
from moesr.runtime.system import console, file_hashes
from moesr.runtime.system.file_hashes import Stamp
from moesr.runtime.system.files import open_input, reason
from moesr.runtime.upscaler import Upscaler

BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"

log = logging.getLogger("moesr")


def run(
    upscaler: Upscaler,
    paths: Sequence[Path],
    output: str | None,
    options: Mapping[str, Any],
    *,
    force: bool = False,
    quiet: bool = False,
    pre_clean: PreCleaner | None = None,
) -> int:
    """Work on all inputs and report them; returns the highest exit code of all inputs.

    `options` are those of `Upscaler.map`; `pre_clean` cleans the images first. Raises UsageError if there are
    no inputs.
    """
    wanted = describe(upscaler.manifest, options)
    if pre_clean:
        cleaned = {"pre_clean": f"{pre_clean.path.name} {pre_clean.sha256[:8]}"}
        wanted = replace(wanted, settings={**wanted.settings, **cleaned})
    made = plan(paths, output, wanted, force)
    for note in made.notes:
        log.info("%s", note)
    if not (made.listing.inputs or made.listing.failed):
        raise UsageError(f"no images in {', '.join(map(str, paths))}")
    batch = Batch(upscaler, made, wanted, pre_clean)
    for error in made.listing.failed:
        batch.fail(None, error)
    batch.run(options, quiet)
    counts = {"done": batch.done, "skipped": batch.skipped, "failed": batch.failed}
    if sum(counts.values()) > 1:
        log.info("%s", ", ".join(f"{count} {what}" for what, count in counts.items()))
    return batch.code


def describe(manifest: Manifest, options: Mapping[str, Any]) -> Provenance:
    """The record of results that `options` make with an engine; the source is not known yet.

    UsageError if the engine does not support the options.
    """
    engine = f"{manifest.name} {manifest.precision} {manifest.checkpoint_sha256[:8]}"
    return Provenance(manifest.scale, engine, resolve(manifest, **options).recorded())


@dataclass(eq=False)
class _Flight:
    """An image that was read and whose result has not been written yet."""

    task: Task
    position: int  # of the input among all, from 1
    image: LoadedImage
    record: Provenance
    size: tuple[int, int]  # height and width of the result
    begun: bool = False  # the upscaler has given it its memory

    @property
    def area(self) -> int:
        """Pixels of the input, which its work is proportional to."""
        return self.image.pixels.shape[0] * self.image.pixels.shape[1]


class Progress:
    """The fraction of all work that is done, from what the upscaler reports about the images it has begun.

    The work on images that are not begun is estimated from their pixels, or, before they are read, from the
    mean of the images that are. The fraction never decreases.
    """

    def __init__(self, count: int) -> None:
        self.fraction = 0.0
        self.unread = count  # inputs that were neither read nor skipped
        self._areas = {"begun": 0, "waiting": 0}
        self._read = 0

    def read(self, area: int) -> None:
        """Count an image that was read."""
        self.unread -= 1
        self._read += 1
        self._areas["waiting"] += area

    def begin(self, area: int) -> None:
        """Count an image that was read as begun."""
        self._areas["begun"] += area
        self._areas["waiting"] -= area

    def drop(self, area: int) -> None:
        """Forget an image that was read and failed before it was begun."""
        self._areas["waiting"] -= area
        self._read -= 1

    def update(self, done: float, total: float) -> float:
        """The fraction, if `done` of `total` seconds of work on the begun images are done."""
        begun, known = self._areas["begun"], sum(self._areas.values())
        if begun and total > 0:
            everything = known * (1 + self.unread / max(self._read, 1))
            self.fraction = max(self.fraction, min(done / total * begun / everything, 1.0))
        return self.fraction


@dataclass
class Batch:
    """The inputs of a plan on their way through one upscaler; one that fails leaves the others alone."""

    upscaler: Upscaler
    plan: OutputPlan
    wanted: Provenance
    pre_clean: PreCleaner | None = None
    done: int = 0
    skipped: int = 0
    failed: int = 0
    code: int = 0
    _flight: deque[_Flight] = field(default_factory=deque)

    def run(self, options: Mapping[str, Any], quiet: bool = False) -> None:
        """Work on every input. The bar appears with the first image that is read."""
        self._quiet, self._bar = quiet, None
        self._progress = Progress(len(self.plan.listing.inputs))
        results = self.upscaler.map(
            self._images(), return_errors=True, progress=self._report, begun=self._begin, **options
        )
        try:
            for result in results:
                self._finish(self._flight.popleft(), result)
            if self._bar is not None and self._progress.fraction:
                self._bar.update(1.0 - self._bar.n)
        finally:
            if self._bar is not None:
                self._bar.close()

    def _images(self) -> Iterator[LoadedImage]:
        """Decide on each input, and read it, when the upscaler has room for another image."""
        for position, found in enumerate(self.plan.listing.inputs, 1):
            flight = self._read(found, position)
            if flight is None:
                self._progress.unread -= 1
                continue
            self._flight.append(flight)
            self._progress.read(flight.area)
            yield flight.image

    def _read(self, found: Input, position: int) -> _Flight | None:
        """Read and clean an input; None if there is nothing to do or it failed."""
        try:
            task = self.plan.decide(found)
            if isinstance(task, str):
                self.skipped += 1
                log.info("%s", task)
                return None
            self._show()
            image, digest = read_input(task)
            height, width = (side * self.wanted.scale for side in image.pixels.shape[:2])
            writing.check_output(task.target, width, height)
            if self.pre_clean:
                self._show(f"cleaning {task.source.name}")
                image = reading.with_pixels(image, self.pre_clean(image.pixels))
        except (MoesrError, MemoryError, OSError) as error:
            self.fail(found.path, error)
            return None
        return _Flight(task, position, image, self.wanted.of(task.source.name, digest), (height, width))

    def _begin(self, image: LoadedImage) -> None:
        flight = next(flight for flight in self._flight if flight.image is image)
        flight.begun = True
        self._progress.begin(flight.area)

    def _report(self, done: float, total: float, stage: str) -> None:
        fraction, first = self._progress.update(done, total), self._flight[0]
        text = console.printable(f"{first.position}/{len(self.plan.listing.inputs)} {first.task.source.name}")
        bar = self._show(stage)
        bar.set_description(text[-40:], refresh=False)
        bar.update(fraction - bar.n)

    def _show(self, stage: str = "") -> tqdm:
        """The bar, with a word about what is going on."""
        if self._bar is None:
            self._bar = console.bar(self._quiet, total=1.0, bar_format=BAR)
        self._bar.set_postfix_str(console.printable(stage)[-40:], refresh=False)
        return self._bar

    def _finish(self, flight: _Flight, result: LoadedImage | Exception) -> None:
        """Write a result and report it."""
        task = flight.task
        if not flight.begun:
            self._progress.drop(flight.area)
        if isinstance(result, Exception):
            self.fail(task.source, result)
            return
        try:
            writing.save(task.target, _of_size(result, flight.size), flight.record)
        except (MoesrError, MemoryError, OSError) as error:
            self.fail(task.source, error)
        else:
            self.done += 1
            console.say(f"{task.source} -> {task.target}")

    def fail(self, source: Path | None, error: Exception) -> None:
        """Report an input's error; the exit code of the batch becomes the highest one."""
        self.failed += 1
        text = reason(error) if isinstance(error, OSError) else str(error)
        text = text or "out of memory; use a smaller image"
        if source and str(source) not in text:
            text = f"{source}: {text}"
        log.error("%s", text)
        code = 1 if isinstance(error, OSError) else MemoryLimitError.exit_code
        code = error.exit_code if isinstance(error, MoesrError) else code
        # A UsageError of one file: the command was right, the file was not.
        self.code = max(self.code, 1 if code == UsageError.exit_code else code)


def read_input(task: Task) -> tuple[LoadedImage, str]:
    """An image and the SHA-256 of the file it was read from, which is opened once.

    Raises InputError if the file cannot be read or changes meanwhile.
    """
    path = task.source
    with open_input(path) as stream:
        try:
            before = Stamp.of(os.fstat(stream.fileno()))
            digest = task.digest if task.stamp == before else ""
            digest = digest or file_hashes.sha256_of_stream(stream, path)
            image = reading.load(path, stream)
            after = Stamp.of(os.fstat(stream.fileno()))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    if (after.size, after.modified_ns) != (before.size, before.modified_ns):
        raise InputError(f"{path}: changed while it was read; run again once it is complete")
    return image, digest


def _of_size(image: LoadedImage, size: tuple[int, int]) -> LoadedImage:
    """The image, resized if cleaning had made it larger than was asked for."""
    if image.pixels.shape[:2] == size:
        return image
    return reading.with_pixels(image, imresize(image.pixels, *size))
