"""The Python interface: an engine opened once, images in, larger images out.

from moesr.runtime import Upscaler

with Upscaler("engine") as up:
    sr = up(image, steps=50, seed=0)
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, Unpack

import numpy as np
from PIL import Image

from moesr.runtime.backends import autotune
from moesr.runtime.backends.selection import Backend, candidates
from moesr.runtime.devices.interface import Session
from moesr.runtime.engine.locate import engine_directory
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError, MoesrError, NonFiniteError, UsageError
from moesr.runtime.images import reading, writing
from moesr.runtime.images.planes import Planes, split
from moesr.runtime.images.reading import LoadedImage
from moesr.runtime.loop import processing
from moesr.runtime.loop.admission import Admission, Reservation
from moesr.runtime.loop.cost_model import Costs
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.residency import Residency
from moesr.runtime.loop.settings import Options, Settings, resolve
from moesr.runtime.loop.worker import CLOSED, Worker
from moesr.runtime.system import user_cache

Progress = Callable[[float, float, str], None]
"""Called with the work done and the work in all, both in estimated seconds, and the stage.

The stage is "encoding", "sampling" or "decoding". Estimates start from multiply-accumulates and follow what
this process measures, so the work in all may change on the way.
"""

log = logging.getLogger("moesr")

Picture = TypeVar("Picture", np.ndarray, Image.Image, LoadedImage)


@dataclass(eq=False)
class _Ticket:
    """An image in flight: either a job, or the error that kept it from becoming one."""

    loaded: LoadedImage | None = None  # what came in, where that was not an array
    kind: type = np.ndarray
    planes: Planes | None = None
    room: Reservation | None = None
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
        precision: str = "graph",
        cache: Path | str | Literal[False] | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        """Open an engine directory, or a bundled engine by its name: "demo-x4" (as for None), "demo-x8".

        `verify` compares the graphs' hashes. `threads`, and `max_batch` (tiles run at once), default to the
        backend's choice. `precision` of the arithmetic: "graph", "bf16" where a backend can, or "auto", the
        faster of the two, as for an engine in bf16. `cache`: the directory where graphs are kept as backends
        prepare them, the user's unless another is given; False keeps none on a CPU. Where there is a choice
        it falls on what was measured as the fastest, once for an engine and machine. `cuda_graphs` False has
        a GPU do the same launch by launch. Raises EngineError or UsageError; graphs are loaded when first
        needed.
        """
        kept = user_cache.directory() if cache is None else Path(cache) if cache else None
        choose = partial(candidates, backend, device, threads, max_batch, cache=kept, cuda_graphs=cuda_graphs)
        found = choose(precision=precision)
        self.directory = engine_directory(engine)
        self.manifest = read_manifest(self.directory, verify=verify)
        if (precision, self.manifest.precision) == ("graph", "bf16"):  # which float32 serves as well
            found = choose(precision="auto")
        log.info("engine %s in %s", self.manifest.name, self.manifest.precision)
        self.backend, self.measured = autotune.choose(found, self.directory, self.manifest)
        self.backend.warn(self.manifest.precision)
        place = self.backend.device(self.directory)
        opener = partial(_open, self.backend, self.directory, self.manifest, place.stream)
        self._costs = Costs(self.manifest.graphs)
        self._admission = Admission(
            self.manifest,
            self.directory,
            self.backend.target,
            self.backend.max_batch,
            lambda: residency.loaded,
            shared=self.backend.shares_memory,
            at_once=self.backend.opens_at_once,
            gpu_bytes=place.free_bytes,
        )
        residency = Residency(opener, self._admission.keep_all)
        self._worker = Worker(place, residency, self._costs, self.backend.max_batch)
        self._release = weakref.finalize(self, _close, self._worker, self.backend)

    def __enter__(self) -> Upscaler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the graphs. Images in flight, and further calls, end with UsageError."""
        self._release()

    def __call__(
        self, image: Picture, *, progress: Progress | None = None, **options: Unpack[Options]
    ) -> Picture:
        """Super-resolve one image: a uint8 or uint16 array HxW or HxWx{1,2,3,4}, or a PIL image of any mode.

        Returns the same kind, dtype and channels (grey stays grey, alpha is kept), `scale` times the size;
        PIL images come back as L, LA, RGB, RGBA or I;16. For the options see `Options`. `progress` is called
        from this thread while the work goes on. Raises InputError, UsageError, MemoryLimitError or
        EngineError.
        """
        return next(self._map([image], self._settings(options), False, progress))

    def map(
        self,
        images: Iterable[Any],
        *,
        return_errors: bool = False,
        progress: Progress | None = None,
        begun: Callable[[Any], None] | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Any]:
        """Super-resolve many images in order, several in flight; options and results as for one image.

        The next image is fetched while the one before it is worked on. With `return_errors`, the MoesrError
        or MemoryError of one image is yielded in its place and the others go on; an engine that cannot be
        used at all is raised. `progress` counts the images begun, and `begun` is called with each of them
        when it has been given its memory.
        """
        return self._map(images, self._settings(options), return_errors, progress, begun)

    def _map(
        self,
        images: Iterable[Any],
        settings: Settings,
        return_errors: bool,
        progress: Progress | None,
        begun: Callable[[Any], None] | None = None,
    ) -> Iterator[Any]:
        flight: deque[_Ticket] = deque()
        finished: Counter[str] = Counter()  # tiles of images that have left
        coming = _LookAhead(images)

        def report() -> None:
            jobs = [ticket.job for ticket in flight if ticket.job]
            if progress and jobs:
                done = sum((job.ran for job in jobs), finished)
                total = sum((job.planned for job in jobs), finished)
                progress(self._costs.seconds(done), self._costs.seconds(total), jobs[0].stage)

        try:
            while True:
                while len(flight) < max(self.backend.max_batch, 2) and coming.fetch():
                    ticket = self._begin(coming.item, settings, wait=not flight)
                    if ticket is None:  # no room yet
                        break
                    if begun and ticket.job:
                        begun(coming.item)
                    coming.take()
                    flight.append(ticket)
                if not flight:
                    return
                report()
                result = self._end(flight[0], report)
                if isinstance(result, Exception) and not (return_errors and _spares_others(result)):
                    raise result
                ticket = flight.popleft()
                finished += ticket.job.ran if ticket.job else Counter()
                yield result
        finally:
            for ticket in flight:
                self._let_go(ticket)

    def _begin(self, image: Any, settings: Settings, wait: bool) -> _Ticket | None:
        """Check an image and put it in flight; what is wrong with it goes into the ticket.

        None where memory has to be freed first by images in flight and the caller would not `wait`.
        """
        ticket = _Ticket(kind=type(image))
        try:
            if isinstance(image, Image.Image):
                ticket.loaded, ticket.kind = reading.from_pil(image), Image.Image
            elif isinstance(image, LoadedImage):
                ticket.loaded = image
            ticket.planes = split(ticket.loaded.pixels if ticket.loaded else image)
            ticket.room = self._reserve(ticket.planes, settings, wait=wait)
            if ticket.room is None:
                return None
            ticket.job = ticket.room.job = processing.prepare(self.manifest, ticket.planes, settings)
            self._worker.submit(ticket.job)
        except (MoesrError, MemoryError) as error:
            self._let_go(ticket)
            ticket.error = error
        return ticket

    def _reserve(self, planes: Planes, settings: Settings, *, wait: bool) -> Reservation | None:
        """Room for an image; None where there is none yet and the caller would not wait."""
        found: list[Reservation] = []
        height, width = planes.rgb.shape[:2]

        def attempt() -> bool:
            room = self._admission.reserve(height, width, settings)
            found.extend([room] if room else [])
            return bool(room) or not wait

        self._worker.wait_until(attempt)
        return found[0] if found else None

    def _end(self, ticket: _Ticket, report: Callable[[], None]) -> Any:
        """Wait for an image; returns the result or the error."""
        if ticket.error or not ticket.job or not ticket.planes:
            return ticket.error
        try:
            self._worker.wait(ticket.job, report)
            pixels = processing.finish(self.manifest, ticket.planes, ticket.job)
        except (MoesrError, MemoryError) as error:
            return error
        finally:
            self._let_go(ticket)
        self._admission.warm = True
        if ticket.loaded is None:
            return pixels
        if ticket.kind is Image.Image:
            return writing.to_pil(pixels, ticket.loaded)
        return reading.with_pixels(ticket.loaded, pixels)

    def _let_go(self, ticket: _Ticket) -> None:
        """Forget an image that has left, failed, or is not wanted any more."""
        if ticket.job:
            self._worker.cancel(ticket.job)
        if ticket.room:
            ticket.room.dropped = True

    def _settings(self, options: Options) -> Settings:
        """The settings that options ask for; UsageError if this is closed or an option is wrong."""
        if not self._release.alive:
            raise UsageError(CLOSED)
        return resolve(self.manifest, **options)


class _LookAhead:
    """An iterator whose next item may be looked at before it is taken."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._source = iter(items)
        self._held: list[Any] = []

    def fetch(self) -> bool:
        """Have the next item at hand; False at the end."""
        if not self._held:
            for item in self._source:
                self._held.append(item)
                break
        return bool(self._held)

    @property
    def item(self) -> Any:
        """The next item."""
        return self._held[0]

    def take(self) -> None:
        """Go on to the one after it."""
        self._held.clear()


def _open(backend: Backend, directory: Path, manifest: Manifest, stream: int | None, role: str) -> Session:
    return backend.open(directory, manifest.graphs[role], stream)


def _close(worker: Worker, backend: Backend) -> None:
    """Release what an Upscaler holds; it is not referred to, so that this can run when it is gone."""
    worker.close()
    backend.release()


def _spares_others(error: Exception) -> bool:
    """Whether other images can still be done after this error."""
    return isinstance(error, NonFiniteError) or not isinstance(error, (EngineError, UsageError))
