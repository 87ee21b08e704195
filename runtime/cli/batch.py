"""Many image files through one upscaler: loaded, done, saved and reported."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moesr.runtime.cli.outputs import Task, plan
from moesr.runtime.cli.preclean import PreCleaner
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import MemoryLimitError, MoesrError, UsageError
from moesr.runtime.images import reading, writing
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.resize import imresize
from moesr.runtime.loop.settings import resolve
from moesr.runtime.system import console
from moesr.runtime.system.files import sha256_of
from moesr.runtime.upscaler import Upscaler

BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"

log = logging.getLogger("moesr")


def run(
    upscaler: Upscaler,
    inputs: Sequence[Path],
    output: str | None,
    options: Mapping[str, Any],
    *,
    force: bool = False,
    quiet: bool = False,
    pre_clean: PreCleaner | None = None,
) -> int:
    """Do all inputs and say how it went; returns the exit code, the gravest of all inputs'.

    `options` are those of `Upscaler.map`; `pre_clean` cleans the images before. UsageError where there are no
    inputs.
    """
    wanted = describe(upscaler.manifest, options)
    if pre_clean:
        cleaned = {"pre_clean": f"{pre_clean.path.name} {pre_clean.sha256[:8]}"}
        wanted = replace(wanted, settings={**wanted.settings, **cleaned})
    made = plan(inputs, output, wanted, force)
    for note in made.notes:
        log.info("%s", note)
    if not (made.tasks or made.skipped or made.failed):
        raise UsageError(f"no images in {', '.join(map(str, inputs))}")
    batch = Batch(upscaler, made.tasks, wanted, pre_clean)
    for line in made.skipped:
        log.info("%s", line)
    for error in made.failed:
        batch.fail(None, error)
    if made.tasks:
        with console.bar(quiet, total=1.0, bar_format=BAR) as bar:
            batch.run(options, bar)
    counts = {"done": batch.done, "skipped": len(made.skipped), "failed": batch.failed}
    if sum(counts.values()) > 1:
        log.info("%s", ", ".join(f"{count} {what}" for what, count in counts.items()))
    return batch.code


def describe(manifest: Manifest, options: Mapping[str, Any]) -> Provenance:
    """The record of results that `options` make with an engine; the source is not known yet.

    UsageError if the engine does not support the options.
    """
    engine = f"{manifest.name} {manifest.precision} {manifest.checkpoint_sha256[:8]}"
    return Provenance(manifest.scale, engine, resolve(manifest, **options).recorded())


class Batch:
    """Tasks on their way through one upscaler; a task that fails is reported and leaves the others alone."""

    def __init__(
        self,
        upscaler: Upscaler,
        tasks: Sequence[Task],
        wanted: Provenance,
        pre_clean: PreCleaner | None = None,
    ) -> None:
        self._upscaler, self._tasks, self._wanted, self._pre_clean = upscaler, tasks, wanted, pre_clean
        self._begun: deque[tuple[Task, Provenance, tuple[int, int]]] = (
            deque()
        )  # loaded, result of that size to come
        self._loaded = self._lost = 0  # tasks that were begun, and that could not be
        self.done = self.failed = self.code = 0

    def run(self, options: Mapping[str, Any], bar: tqdm) -> None:
        """Do every task."""

        def progress(done: float, total: float, stage: str) -> None:
            # The upscaler knows the images begun; the others are taken to be as large.
            bar.total = total * (len(self._tasks) - self._lost) / max(self._loaded, 1)
            task = self._begun[0][0]
            position = self._tasks.index(task) + 1
            bar.set_description(f"{position}/{len(self._tasks)} {task.source.name}"[-40:], refresh=False)
            bar.set_postfix_str(stage, refresh=False)
            bar.update(done - bar.n)

        results = self._upscaler.map(self._images(bar), return_errors=True, progress=progress, **options)
        for result in results:
            task, record, size = self._begun.popleft()
            if isinstance(result, Exception):
                self.fail(task, result)
                continue
            try:
                writing.save(task.target, _of_size(result, size), record)
            except (MoesrError, MemoryError) as error:
                self.fail(task, error)
            else:
                self.done += 1
                console.say(f"{task.source} -> {task.target}")
        if bar.n:  # the images after the last one begun could not be loaded
            bar.total = bar.n
            bar.refresh()

    def _images(self, bar: tqdm) -> Iterator[reading.LoadedImage]:
        """Load each input, and clean it, when the upscaler has room for it."""
        for task in self._tasks:
            try:
                loaded = reading.load(task.source)
                height, width = (side * self._wanted.scale for side in loaded.pixels.shape[:2])
                writing.check_output(task.target, width, height)
                record = self._wanted.of(task.source.name, sha256_of(task.source))
                if self._pre_clean:
                    bar.set_postfix_str(f"cleaning {task.source.name}"[-40:])
                    loaded = reading.with_pixels(loaded, self._pre_clean(loaded.pixels))
            except (MoesrError, MemoryError) as error:
                self._lost += 1
                self.fail(task, error)
                continue
            self._loaded += 1
            self._begun.append((task, record, (height, width)))
            yield loaded

    def fail(self, task: Task | None, error: Exception) -> None:
        """Report an input's error; the exit code becomes the gravest one."""
        self.failed += 1
        text = str(error) or "out of memory; use a smaller image"
        if task and str(task.source) not in text:
            text = f"{task.source}: {text}"
        log.error("%s", text)
        code = error.exit_code if isinstance(error, MoesrError) else MemoryLimitError.exit_code
        # A UsageError of one file: the command was right, the file was not.
        self.code = max(self.code, 1 if code == UsageError.exit_code else code)


def _of_size(image: reading.LoadedImage, size: tuple[int, int]) -> reading.LoadedImage:
    """The image, resized where cleaning had made it larger than was asked for."""
    if image.pixels.shape[:2] == size:
        return image
    return reading.with_pixels(image, imresize(image.pixels, *size))
