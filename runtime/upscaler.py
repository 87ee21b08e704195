"""The Python interface: an engine opened once, images in, larger images out.

from moesr.runtime import Upscaler

with Upscaler("engine") as up:
    sr = up(image, steps=50, seed=0)
"""

from __future__ import annotations

import importlib.resources
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from moesr.runtime import image_io, memory, pipeline
from moesr.runtime.colour import COLOR_FIXES
from moesr.runtime.errors import EngineError, MemoryLimitError, MoesrError, NonFiniteError, UsageError
from moesr.runtime.manifest import MANIFEST_NAME, SAMPLERS, Graph, Manifest
from moesr.runtime.pixels import Planes, split
from moesr.runtime.residency import Residency
from moesr.runtime.scheduler import Job, Scheduler, Settings
from moesr.runtime.sessions import Session, select_backend

Progress = Callable[[int, int, str], None]
"""Called with the tiles run so far, the tiles in all and the stage ("sampling" or "decoding")."""

DEMO_ENGINES = ("demo-x4", "demo-x8")
"""Names of the engines that come with the package."""

HELD, OPENING = 2.0, 3.5
"""Memory of a graph over its file's size, once open and while it opens: its kernels are kept transformed.

Measured on the full-width networks with ONNX Runtime on a CPU.
"""

Picture = TypeVar("Picture", np.ndarray, Image.Image)


@dataclass(eq=False)
class _Ticket:
    """An image in flight: either a job, or the error that kept it from becoming one."""

    loaded: image_io.LoadedImage | None = None  # where the image came as one, or as a PIL image
    as_pil: bool = False
    planes: Planes | None = None
    job: Job | None = None
    error: Exception | None = None


class Upscaler:
    """Super-resolution with one engine. Threads may share it: their images are worked on together."""

    def __init__(
        self,
        engine: Path | str | None = None,
        *,
        backend: str = "auto",
        device: str | None = None,
        threads: int | None = None,
        verify: bool = True,
        max_batch: int | None = None,
    ) -> None:
        """Open an engine directory, or a bundled engine by its name: "demo-x4" (as for None), "demo-x8".

        `verify` compares the graphs' hashes. `threads`, and `max_batch` (tiles run at once), default to the
        backend's choice. Raises EngineError or UsageError; graphs are loaded when first needed.
        """
        self.directory = engine_directory(engine)
        self.manifest = Manifest.read(self.directory, verify=verify)
        self.backend = select_backend(backend, device, threads, max_batch)
        self._sizes = {g.file: (self.directory / g.file).stat().st_size for g in self.manifest.graphs}
        free = memory.available_bytes()
        self._keep_all = free is None or HELD * sum(self._sizes.values()) <= free // 2
        self._residency = Residency(self._open, self._keep_all)
        self._scheduler = Scheduler(self._residency, self.manifest.precision)
        self._closed = False
        self._warm = False  # whether the graphs have taken their working memory

    def _open(self, graph: Graph) -> Session:
        return self.backend.open(self.directory, self.manifest, graph)

    def __enter__(self) -> Upscaler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the graphs. Further calls raise UsageError."""
        self._closed = True
        self._residency.close()

    def __call__(
        self,
        image: Picture,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 42,
        color_fix: str = "adain",
        fidelity: float = 1.0,
        progress: Progress | None = None,
    ) -> Picture:
        """Super-resolve one image: a uint8 or uint16 array HxW or HxWx{1,2,3,4}, or a PIL image of any mode.

        Returns the same kind, dtype and channels (grey stays grey, alpha is kept), `scale` times the size;
        PIL images come back as L, LA, RGB, RGBA or I;16. `steps` (1 to the schedule's timesteps) and
        `sampler` ("ddpm", "ddim") default to the engine's; `color_fix` is "adain", "wavelet" or "none";
        `fidelity` goes from 0 (free) to 1 (faithful). `progress` is called from this thread after each batch.
        Raises InputError, UsageError, MemoryLimitError or EngineError.
        """
        settings = self._settings(steps, sampler, seed, color_fix, fidelity)
        return next(self._map([image], settings, False, progress))

    def map(
        self,
        images: Iterable[Any],
        *,
        return_errors: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Super-resolve many images in order, several in flight; options and results as for one image.

        With `return_errors`, the MoesrError or MemoryError of one image is yielded in its place and the
        others go on; an engine that cannot be used at all is raised. `progress` counts the images begun.
        """
        return self._map(images, self._settings(**options), return_errors, progress)

    def _map(
        self, images: Iterable[Any], settings: Settings, return_errors: bool, progress: Progress | None
    ) -> Iterator[Any]:
        flight: deque[_Ticket] = deque()
        finished = 0  # tiles of images that have left
        source = iter(images)

        def report() -> None:
            jobs = [ticket.job for ticket in flight if ticket.job]
            if progress and jobs:
                done, total = sum(job.units for job in jobs), sum(job.total for job in jobs)
                progress(finished + done, finished + total, jobs[0].phase.stage)

        try:
            while True:
                for image in islice(source, self.backend.max_batch - len(flight)):
                    flight.append(self._begin(image, settings))
                if not flight:
                    return
                report()
                result = self._end(flight[0], settings, report)
                if isinstance(result, Exception) and not (return_errors and _spares_others(result)):
                    raise result
                ticket = flight.popleft()
                finished += ticket.job.units if ticket.job else 0
                yield result
        finally:
            for ticket in flight:
                if ticket.job:
                    self._scheduler.cancel(ticket.job)

    def _begin(self, image: Any, settings: Settings) -> _Ticket:
        """Check an image and put it in flight; what is wrong with it goes into the ticket."""
        ticket = _Ticket()
        try:
            if isinstance(image, Image.Image):
                ticket.loaded, ticket.as_pil = image_io.from_pil(image), True
            elif isinstance(image, image_io.LoadedImage):
                ticket.loaded = image
            if ticket.loaded:
                image = ticket.loaded.pixels
            self._check_memory(image)
            ticket.planes = split(image)
            ticket.job = pipeline.prepare(self.manifest, ticket.planes, settings)
            self._scheduler.submit(ticket.job)
        except (MoesrError, MemoryError) as error:
            ticket.error = error
        return ticket

    def _end(self, ticket: _Ticket, settings: Settings, report: Callable[[], None]) -> Any:
        """Wait for an image; returns the result or the error."""
        if ticket.error or not ticket.job or not ticket.planes:
            return ticket.error
        try:
            self._scheduler.run(ticket.job, report)
            pixels = pipeline.finish(self.manifest, ticket.planes, ticket.job, settings.color_fix)
        except (MoesrError, MemoryError) as error:
            return error
        self._warm = True
        if ticket.loaded is None:
            return pixels
        if ticket.as_pil:
            return image_io.to_pil(pixels, ticket.loaded)
        return image_io.with_pixels(ticket.loaded, pixels)

    def _check_memory(self, image: Any) -> None:
        """Compare an estimate with what is free; MemoryLimitError before any work where it cannot fit."""
        free = memory.available_bytes()
        if free is None or np.ndim(image) < 2:
            return
        height, width = np.shape(image)[:2]
        sizes = sorted(size for file, size in self._sizes.items() if file not in self._residency.loaded)
        held = sizes if self._keep_all else sizes[-2:]
        weights = int(HELD * sum(held) + (OPENING - HELD) * max(held, default=0))
        work = 0 if self._warm else pipeline.activation_bytes(self.manifest, self.backend.max_batch)
        need = weights + work + pipeline.image_bytes(self.manifest, height, width)
        if need > free:
            scale = self.manifest.scale
            raise MemoryLimitError(
                f"{width}x{height} to {width * scale}x{height * scale} pixels needs about "
                f"{memory.readable(need)} of memory, {memory.readable(free)} are free; close other programs, "
                "split the image, or export an engine with smaller tiles"
            )

    def _settings(
        self,
        steps: int | None = None,
        sampler: str | None = None,
        seed: int = 42,
        color_fix: str = "adain",
        fidelity: float = 1.0,
    ) -> Settings:
        """Fill in the engine's defaults and check everything; UsageError names the option."""
        if self._closed:
            raise UsageError("this Upscaler is closed; open another")
        manifest = self.manifest
        sampler = manifest.sampler if sampler is None else sampler
        for option, value, choices in (("sampler", sampler, SAMPLERS), ("color_fix", color_fix, COLOR_FIXES)):
            if value not in choices:
                raise UsageError(f"{option} is {value!r}, expected one of {', '.join(choices)}")
        count = _whole("steps", manifest.steps if steps is None else steps, 1, manifest.schedule.timesteps)
        if not isinstance(fidelity, (int, float, np.floating)) or not 0.0 <= fidelity <= 1.0:
            raise UsageError(f"fidelity is {fidelity!r}, expected a number from 0 to 1")
        return Settings(count, sampler, _whole("seed", seed, 0, 2**64 - 1), color_fix, float(fidelity))


def demo_name(given: Path | str | None) -> str | None:
    """The name in DEMO_ENGINES that is meant, the first for None; None where it is a path of the user's."""
    if given is None:
        return DEMO_ENGINES[0]
    return str(given) if str(given) in DEMO_ENGINES and not Path(given).exists() else None


def engine_directory(engine: Path | str | None = None) -> Path:
    """Directory of an engine given as a path or as one of DEMO_ENGINES, which come with the package.

    None is the first of them; a directory of that name goes before the bundled one. Raises EngineError where
    a bundled engine was left out of the installation.
    """
    name = demo_name(engine)
    if name is None:
        return Path(str(engine))
    path = Path(str(importlib.resources.files("moesr.runtime") / "demo_engines" / name))
    if not (path / MANIFEST_NAME).is_file():
        raise EngineError(
            f"this installation has no bundled demo engine ({path}); name an engine directory, "
            "made with moesr-export -o DIR"
        )
    return path


def _whole(option: str, value: Any, least: int, most: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise UsageError(f"{option} is {value!r}, expected a whole number from {least} to {most}")
    return number


def _spares_others(error: Exception) -> bool:
    """Whether other images can still be done after this error."""
    return isinstance(error, NonFiniteError) or not isinstance(error, EngineError)
