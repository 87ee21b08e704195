"""Many files of latents through one autoencoder: they are read, decoded, written and reported."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moesr.runtime.autoencoder import Autoencoder
from moesr.runtime.cli import inputs, outputs
from moesr.runtime.cli.batch import account_of, summary
from moesr.runtime.cli.inputs import Input, Listing
from moesr.runtime.cli.outputs import Naming, OutputNames, Task
from moesr.runtime.cli.progress import Display
from moesr.runtime.cli.report import Entry, Report
from moesr.runtime.errors import InputError, MoesrError, UsageError
from moesr.runtime.images import writing
from moesr.runtime.images.latents import READERS, read_latents
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.loop.processing import to_integers
from moesr.runtime.system import console
from moesr.runtime.system.file_hashes import sha256_of_stream
from moesr.runtime.system.files import open_input

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class DecodeOptions:
    """The options for finding, decoding, writing and reporting the files of a run."""

    force: bool = False
    recursive: bool = False
    suffix: str = ""
    extension: str = ".png"
    quality: int | None = None  # quality of JPEG and WebP
    scaled: bool = True  # latents are those of the text-to-image model
    refined: bool = True
    fail_fast: bool = False
    quiet: bool = False
    json_progress: bool = False
    log: Path | None = None

    def record(self, vae: Autoencoder) -> Provenance:
        """Return the record of results, without their source."""
        manifest = vae.manifest
        settings: dict[str, Any] = {"scaling_factor": vae.scaling_factor, "unscaled": not self.scaled}
        settings["no_refinement"] = not self.refined
        if self.quality is not None:
            settings["quality"] = self.quality
        engine = f"{manifest.name} {manifest.precision} {manifest.checkpoint_sha256[:8]}"
        return Provenance(vae.factor, engine, settings, origin=vae.origin)


def run(vae: Autoencoder, paths: Sequence[Path], output: str | None, how: DecodeOptions) -> int:
    """Decode all inputs, report them, and return the highest of their exit codes.

    Raises UsageError if there are no inputs, or no refinement network to leave out.
    """
    if not (how.refined or vae.refines):
        raise UsageError(f"{vae.manifest.name} has no refinement network; leave out --no-refinement")
    place = outputs.check_usage(paths, output)
    listing = inputs.find(
        paths, recursive=how.recursive, ignored=place, suffixes=tuple(READERS), noun="files of latents"
    )
    for note in listing.notes:
        log.info("%s", note)
    if not (listing.inputs or listing.failed):
        raise UsageError(f"no files of latents in {', '.join(map(str, paths))}")
    divided = "are taken as divided by it" if not how.scaled else "are divided by it"
    log.info("scaling factor %g: latents %s", vae.scaling_factor, divided)
    one = Path(output) if output is not None and place is None else None
    batch = DecodeBatch(vae, listing, place, one, how)
    batch.run()
    summary({"done": batch.done, "skipped": batch.skipped, "failed": batch.failed})
    return batch.code


class DecodeBatch:
    """The files of a run on their way through one autoencoder. One that fails does not stop the others."""

    def __init__(
        self, vae: Autoencoder, listing: Listing, place: Path | None, one: Path | None, how: DecodeOptions
    ) -> None:
        """`place` is the directory of all results, `one` the file of the only result."""
        self._vae, self._listing, self._how = vae, listing, how
        self._place, self._one, self._wanted = place, one, how.record(vae)
        self._taken: set[str] = set()
        self._report = Report(how.log, how.json_progress)
        self._display = Display(len(listing.inputs), quiet=how.quiet, as_events=how.json_progress)
        self.done = self.skipped = self.failed = self.code = 0

    def run(self) -> None:
        """Work on every input in order."""
        finished = False
        try:
            for path, error in self._listing.failed:
                if not self._fail(Entry(str(path)), error):
                    return
            for position, found in enumerate(self._listing.inputs, 1):
                entry = Entry(str(found.path))
                try:
                    self._decode_file(found, position, entry)
                except (MoesrError, MemoryError, OSError) as error:
                    if not self._fail(entry, error):
                        return
            finished = True
        finally:
            self._display.close(finished)

    def _decode_file(self, found: Input, position: int, entry: Entry) -> None:
        """Decode all latents of a file."""
        with open_input(found.path) as stream:
            digest = sha256_of_stream(stream, found.path)
            stream.seek(0)
            with self._report.collecting(entry):
                latents = read_latents(stream, found.path, self._vae.channels)
        count = len(latents)
        if self._one and count > 1:
            raise InputError(f"{found.path}: holds {count} latents; name a directory with -o")
        for index, latent in enumerate(latents):
            entry = Entry(str(found.path))
            part = "" if count == 1 else f"_{index + 1:0{len(str(count))}d}"
            wanted = self._wanted.of(found.path.name, digest)
            if part:
                wanted = replace(wanted, settings={**wanted.settings, "latent": index + 1})
            task = self._task(found, part, wanted)
            if not isinstance(task, Task):
                self.skipped += 1
                log.info("%s", task)
                self._report.write(entry.line("skipped", wanted))
                continue

            def show(fraction: float, stage: str, before: int = index) -> None:
                share = (position - 1 + (before + fraction) / count) / len(self._listing.inputs)
                self._display.show(position, found.path.name, stage, min(share, 1.0))

            self._decode(latent, task, wanted, entry, show)

    def _task(self, found: Input, part: str, wanted: Provenance) -> Task | str:
        """Return the task for one latent, or the line that says that its result exists."""
        naming = Naming(f"{part}{self._how.suffix}", self._how.extension)
        names = OutputNames(
            self._listing.inputs,
            wanted,
            naming,
            self._how.force,
            place=self._place,
            one=self._one,
            taken=self._taken,
        )
        return names.decide(found)

    def _decode(self, latent: np.ndarray, task: Task, record: Provenance, entry: Entry, show: Any) -> None:
        """Decode one latent and write its image."""
        height, width = (side * self._vae.factor for side in latent.shape[1:])
        writing.check_output(task.target, width, height)
        with self._report.collecting(entry):
            image = self._vae.decode(
                latent, scaled=self._how.scaled, refined=self._how.refined, progress=show
            )
            writing.save(task.target, Image.fromarray(pixels_of(image)), record, self._how.quality)
        self.done += 1
        entry.result = str(task.target)
        console.say(f"{task.source} -> {task.target}")
        self._report.write(entry.line("done", record))

    def _fail(self, entry: Entry, error: Exception) -> bool:
        """Report an input's error; returns False if the run ends with it."""
        self.failed += 1
        text, code = account_of(error, entry.input)
        log.error("%s", text)
        self.code = max(self.code, code)
        self._report.write(entry.line("failed", self._wanted, text))
        if self._how.fail_fast:
            log.error("stopped after the first failure (--fail-fast)")
        return not self._how.fail_fast


def pixels_of(image: np.ndarray) -> np.ndarray:
    """Return an image [3, H, W] in [-1, 1] as uint8 [H, W, 3], clipped and rounded in float32."""
    values = np.clip(np.ascontiguousarray(image.transpose(1, 2, 0)), -1.0, 1.0)
    return to_integers(values, 255).astype(np.uint8)
