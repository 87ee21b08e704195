"""Many image files through one upscaler: they are read, super-resolved, written and reported."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.cli import compare, forecast, frames, sizes
from moesr.runtime.cli.frames import Frames
from moesr.runtime.cli.inputs import Input
from moesr.runtime.cli.outputs import Naming, OutputPlan, Task, plan, shorten
from moesr.runtime.cli.preclean import PreCleaner
from moesr.runtime.cli.progress import Display, Progress
from moesr.runtime.cli.report import Entry, Report
from moesr.runtime.cli.sizes import Size
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import InputError, MemoryLimitError, MoesrError, UsageError
from moesr.runtime.images import reading, rows, wrapping, writing
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.reading import LoadedImage
from moesr.runtime.images.resize import imresize
from moesr.runtime.images.rows import PlacedImage, SpooledImage
from moesr.runtime.loop.settings import resolve
from moesr.runtime.system import console, file_hashes
from moesr.runtime.system.file_hashes import Stamp
from moesr.runtime.system.files import open_input, reason
from moesr.runtime.upscaler import Upscaler

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class RunOptions:
    """The options for finding, naming, writing and reporting the files of a run."""

    force: bool = False
    recursive: bool = False
    size: Size | None = None  # size of results; None: the engine's scale
    suffix: str | None = None  # end of names of results; None: derived from the size
    extension: str = ".png"
    quality: int | None = None  # quality of JPEG and WebP
    all_frames: bool = False
    preserve_times: bool = False
    compare: bool = False
    fail_fast: bool = False
    any_seed: bool = False  # a result with another seed counts as done
    quiet: bool = False
    json_progress: bool = False
    log: Path | None = None
    to_stdout: bool = False  # the result goes to standard output, where nothing else may be printed
    pre_clean: PreCleaner | None = None

    def settings(self) -> dict[str, Any]:
        """Return those of these options that change the pixels of results, as results record them."""
        values: dict[str, Any] = dict(self.size.recorded()) if self.size else {}
        if self.quality is not None:
            values["quality"] = self.quality
        if self.all_frames:
            values["frames"] = "all"
        if self.pre_clean:
            values["pre_clean"] = f"{self.pre_clean.path.name} {self.pre_clean.sha256[:8]}"
        return values

    def naming(self, scale: int) -> Naming:
        """Return the names of results for an engine of this scale."""
        usual = f"_{self.size.name}" if self.size else f"_x{scale}"
        return Naming(usual if self.suffix is None else self.suffix, self.extension)


def run(
    upscaler: Upscaler,
    paths: Sequence[Path],
    output: str | None,
    options: Mapping[str, Any],
    how: RunOptions | None = None,
    report: Report | None = None,
) -> int:
    """Work on all inputs, report them, and return the highest of their exit codes.

    `options` are those of `Upscaler.map`. The account of every file goes to `report`, by default to the file
    that `how` names. Raises UsageError if there are no inputs.
    """
    wanted, how = prepared(upscaler.manifest, options, how or RunOptions(), upscaler.origin)
    made = plan(
        paths,
        output,
        wanted,
        how.force,
        naming=how.naming(wanted.scale),
        recursive=how.recursive,
        ignored=frozenset({"seed"}) if how.any_seed else frozenset(),
    )
    for note in made.notes:
        log.info("%s", note)
    if not (made.listing.inputs or made.listing.failed):
        raise UsageError(f"no images in {', '.join(map(str, paths))}")
    batch = Batch(upscaler, made, wanted, how, report)
    batch.run(options)
    counts = {"done": batch.done, "skipped": batch.skipped, "failed": batch.failed}
    if left := len(made.listing.inputs) + len(made.listing.failed) - sum(counts.values()):
        counts["not begun"] = left
    summary(counts)
    return batch.code


def prepared(
    manifest: Manifest, options: Mapping[str, Any], how: RunOptions, origin: str = ""
) -> tuple[Provenance, RunOptions]:
    """Return the record of results, without the source, and `how` without a size that is the usual one.

    `origin` is that of `describe`. UsageError is raised if the engine does not support the options.
    """
    if how.size and how.size.scale == manifest.scale:  # the size that results have anyway
        how = dataclasses.replace(how, size=None)
    wanted = describe(manifest, options, origin)
    return dataclasses.replace(wanted, settings={**wanted.settings, **how.settings()}), how


def describe(manifest: Manifest, options: Mapping[str, Any], origin: str = "") -> Provenance:
    """Return the record of results that `options` make with an engine, without the source.

    `origin` is the name of an engine of the hub, see `Provenance`. UsageError is raised if the engine does
    not support the options.
    """
    engine = f"{manifest.name} {manifest.precision} {manifest.checkpoint_sha256[:8]}"
    settings = resolve(manifest, **options).recorded()
    return Provenance(manifest.scale, engine, settings, origin=origin)


@dataclass(eq=False)
class _Flight:
    """An image, or a frame of a file, that was read and whose result has not been written yet."""

    task: Task
    position: int  # position of the input among all inputs, from 1
    frames: Frames
    image: LoadedImage
    record: Provenance
    size: tuple[int, int]  # height and width of the result
    between: tuple[int, int] | None  # the size that a second pass enlarges, or None
    entry: Entry
    status: os.stat_result
    begun: bool = False  # set when the upscaler has allocated its memory

    @property
    def area(self) -> int:
        """The pixels of the input, to which its work is proportional."""
        return self.image.pixels.shape[0] * self.image.pixels.shape[1]

    @property
    def second(self) -> int:
        """The pixels that a second pass enlarges."""
        return self.between[0] * self.between[1] if self.between else 0


class _Stop(Exception):
    """Ends a batch after its first failure."""


class Batch:
    """The inputs of a plan on their way through one upscaler.

    An input that fails does not stop the others.
    """

    def __init__(
        self,
        upscaler: Upscaler,
        made: OutputPlan,
        wanted: Provenance,
        how: RunOptions,
        report: Report | None = None,
    ) -> None:
        """Open the report, by default the file of `how.log`; OutputError if it cannot be written to."""
        self._upscaler, self._plan, self._wanted, self._how = upscaler, made, wanted, how
        self._report = report or Report(how.log, how.json_progress)
        count = len(made.listing.inputs)
        self._progress = Progress(count)
        self._display = Display(count, quiet=how.quiet, as_events=how.json_progress)
        self._flight: deque[_Flight] = deque()
        self._options: Mapping[str, Any] = {}
        self._announced = self._untimed = False
        self.done = self.skipped = self.failed = self.code = 0

    def run(self, options: Mapping[str, Any]) -> None:
        """Work on every input. The bar appears with the first image that is read."""
        self._options = options
        finished = False
        results: Any = self._upscaler.map(
            self._images(), return_errors=True, progress=self._show_progress, begun=self._begin, **options
        )
        try:
            for path, error in self._plan.listing.failed:
                self._fail(Entry(str(path)), error)
            for result in results:
                self._finish(self._flight.popleft(), result)
            finished = True
        except _Stop:
            log.error("stopped after the first failure (--fail-fast)")
        finally:
            results.close()
            self._display.close(finished)

    def _images(self) -> Iterator[LoadedImage]:
        """Yield images: decide about each input and read it when the upscaler has room for another image."""
        for position, found in enumerate(self._plan.listing.inputs, 1):
            entry = Entry(str(found.path))
            self._progress.unread -= 1
            try:
                task = self._decide(found, entry)
                for flight in self._read(task, position, entry) if task else ():
                    self._flight.append(flight)
                    self._progress.read(flight.area, flight.second)
                    yield flight.image
                    if flight.frames.failed:
                        break
            except (MoesrError, MemoryError, OSError) as error:
                for flight in self._flight:
                    flight.frames.failed |= flight.entry is entry
                self._fail(entry, error)

    def _decide(self, found: Input, entry: Entry) -> Task | None:
        """Return the task for an input, or None after a note if there is nothing to do."""
        with self._report.collecting(entry):
            task = self._plan.decide(found)
        if isinstance(task, Task):
            return task
        self.skipped += 1
        log.info("%s", task)
        self._report.write(entry.line("skipped", self._wanted))
        return None

    def _read(self, task: Task, position: int, entry: Entry) -> Iterator[_Flight]:
        """Read and clean an input; a file of several frames gives several images."""
        with open_input(task.source) as stream:
            before = os.fstat(stream.fileno())
            digest = task.digest if task.stamp == Stamp.of(before) else ""
            digest = digest or _hashed(stream, task.source)
            record = self._wanted.of(task.source.name, digest)
            with self._report.collecting(entry):
                several = frames.of(stream, task.source, task.target, every=self._how.all_frames)
            images = frames.read(stream, task.source, several)
            while True:
                with self._report.collecting(entry):
                    image = next(images, None)
                    if image is None:
                        return
                    _check_unchanged(stream, task.source, before)
                    size = self._size_of(image)
                    writing.check_output(task.target, size[1], size[0])
                    frames.check_memory(task.source, several, size)
                    channels = image.pixels.shape[2] if image.pixels.ndim == 3 else 1
                    rows.check_memory(task.target, *size, channels, image.pixels.dtype == np.uint16)
                    if self._how.pre_clean:
                        self._show(position, task, f"cleaning {task.source.name}")
                        image = reading.with_pixels(image, self._how.pre_clean(image.pixels))
                    source = (image.pixels.shape[0], image.pixels.shape[1])
                    middle = sizes.between(source, size, self._wanted.scale)
                    image = _placed(image, task.target.parent)
                    self._announce(task.source, source, size, middle)
                yield _Flight(task, position, several, image, record, size, middle, entry, before)

    def _announce(
        self, name: Path, source: tuple[int, int], size: tuple[int, int], middle: tuple[int, int] | None
    ) -> None:
        """Log what the first image, and every one that takes long, is expected to take."""
        through = [source, middle] if middle else [source]
        passes = [self._upscaler.forecast(*sides, **self._options) for sides in through]
        if self._announced and not forecast.is_long(passes):
            return
        others = 0 if self._announced else self._progress.unread
        log.info("%s", forecast.line(str(name), size, passes, others))
        self._untimed = forecast.total(passes) is None
        self._announced = True

    def _tell_time(self, left: float) -> None:
        """Log the time once the first tiles have shown it."""
        if self._untimed and self._upscaler.timed:
            self._untimed = False
            log.info("expected: about %s more for the images in work", forecast.duration(left))

    def _size_of(self, image: LoadedImage) -> tuple[int, int]:
        height, width = image.pixels.shape[:2]
        if self._how.size:
            return self._how.size.of(height, width)
        return height * self._wanted.scale, width * self._wanted.scale

    def _of_size(self, image: LoadedImage, size: tuple[int, int], folder: Path) -> LoadedImage:
        """The image, resampled if it is not of this size (height, width); a spooled one stays spooled."""
        if image.pixels.shape[:2] == size:
            return image
        if isinstance(image, SpooledImage):
            return rows.resized(image, *size, [folder, Path(tempfile.gettempdir())])
        resize = wrapping.resize if self._options.get("tileable") else imresize
        return reading.with_pixels(image, resize(image.pixels, *size))

    def _begin(self, image: LoadedImage) -> None:
        flight = next(flight for flight in self._flight if flight.image is image)
        flight.begun = True
        self._progress.begin(flight.area)

    def _show_progress(self, done: float, total: float, stage: str) -> None:
        self._progress.update(done, total)
        self._tell_time(total - done)
        first = self._flight[0]
        self._show(first.position, first.task, stage)

    def _show(self, position: int, task: Task, stage: str) -> None:
        self._display.show(position, task.source.name, stage, self._progress.fraction)

    def _finish(self, flight: _Flight, result: LoadedImage | Exception) -> None:
        """Write and report a result when all frames of its file are complete."""
        if not flight.begun:
            self._progress.drop(flight.area)
        several = flight.frames
        if several.failed:
            return
        try:
            with self._report.collecting(flight.entry):
                if isinstance(result, Exception):
                    raise result
                flight.entry.warnings += result.warnings
                final = self._second_pass(flight, result)
                several.results.append(self._of_size(final, flight.size, flight.task.target.parent))
                if len(several.results) < several.count:
                    return
                self._write(flight)
        except (MoesrError, MemoryError, OSError) as error:
            several.failed = True
            self._fail(flight.entry, error)
            return
        self.done += 1
        flight.entry.result = str(flight.task.target)
        if not self._how.to_stdout:
            console.say(f"{flight.task.source} -> {flight.task.target}")
        self._report.write(flight.entry.line("done", flight.record))

    def _second_pass(self, flight: _Flight, result: LoadedImage) -> LoadedImage:
        """Enlarge a result a second time if one pass is not enough for its size."""
        if not flight.between:
            return result

        def progress(done: float, total: float, stage: str) -> None:
            self._progress.update_second(flight.second, min(done / total, 0.999) if total else 0.0)
            self._show(flight.position, flight.task, f"{stage}, second pass")

        folder = flight.task.target.parent
        middle = _placed(self._of_size(result, flight.between, folder), folder)
        final = self._upscaler(middle, progress=progress, **self._options)
        self._progress.update_second(flight.second, 1.0)
        flight.entry.warnings += final.warnings
        return final

    def _write(self, flight: _Flight) -> None:
        """Write the result of an input and everything that goes with it."""
        target, results = flight.task.target, flight.frames.results
        if len(results) > 1 or flight.frames.raster:
            frames.save(target, flight.frames, flight.record, self._how.quality)
        else:
            rows.save(target, results[0], flight.record, self._how.quality)
        if self._how.preserve_times:
            os.utime(target, ns=(flight.status.st_atime_ns, flight.status.st_mtime_ns))
        if self._how.compare:
            page = target.with_name(shorten(target.stem, compare.ENDING))
            compare.write(page, flight.image, results[-1], flight.record)
        for result in results:
            result.written()

    def _fail(self, entry: Entry, error: Exception) -> None:
        """Report an input's error; the exit code of the batch becomes the highest one."""
        self.failed += 1
        text, code = account_of(error, entry.input)
        log.error("%s", text)
        self.code = max(self.code, code)
        self._report.write(entry.line("failed", self._wanted, text))
        if self._how.fail_fast:
            raise _Stop


def account_of(error: Exception, name: str) -> tuple[str, int]:
    """The message about the input `name` that failed with an error, and the exit code that it stands for."""
    text = reason(error) if isinstance(error, OSError) else str(error)
    if isinstance(error, MemoryError):
        text = f"out of memory{f' ({text})' if text else ''}; use a smaller image"
    if name not in text:
        text = f"{name}: {text}"
    code = 1 if isinstance(error, OSError) else MemoryLimitError.exit_code
    code = error.exit_code if isinstance(error, MoesrError) else code
    # A UsageError of one file: the command was right, the file was not.
    return text, 1 if code == UsageError.exit_code else code


def summary(counts: Mapping[str, int]) -> None:
    """Log how many inputs were done, skipped and failed, if there is more than one."""
    if sum(counts.values()) > 1:
        log.info("%s", ", ".join(f"{count} {what}" for what, count in counts.items()))


def _hashed(stream: Any, path: Path) -> str:
    try:
        return file_hashes.sha256_of_stream(stream, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error


def _check_unchanged(stream: Any, path: Path, before: os.stat_result) -> None:
    """Raise InputError if an opened file was modified after `before`."""
    after = os.fstat(stream.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise InputError(f"{path}: was modified while it was read; run again when it is complete")


def _placed(image: LoadedImage, folder: Path) -> PlacedImage:
    """The image, with the folder of its result for temporary files."""
    values = {entry.name: getattr(image, entry.name) for entry in dataclasses.fields(LoadedImage)}
    return PlacedImage(**values, folder=folder)
