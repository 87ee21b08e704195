"""The Python interface: an engine is opened once and super-resolves images.

from moesr.runtime import Upscaler

with Upscaler("engine") as up:
    sr = up(image, steps=50, seed=0)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, Unpack

import numpy as np

from moesr.runtime.backends.selection import Backend
from moesr.runtime.engine.hub_names import name_of, origin_of
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.errors import MoesrError, UsageError
from moesr.runtime.loop.admission import Forecast, forms
from moesr.runtime.loop.array_pictures import Place, batch_of, picture_of
from moesr.runtime.loop.handle import Handle, JobProgress
from moesr.runtime.loop.job import planned_tiles
from moesr.runtime.loop.pipeline import Pipeline, Statistics
from moesr.runtime.loop.sampling_watch import OnStep, SamplingStep
from moesr.runtime.loop.saved_steps import SavedLatents
from moesr.runtime.loop.settings import Options, Settings, resolve
from moesr.runtime.loop.spooled import disk_bytes
from moesr.runtime.loop.stream import ImageStream, InFlight, Progress
from moesr.runtime.loop.work import PRIORITIES, Flow
from moesr.runtime.opened import OpenedEngine
from moesr.runtime.options import one_of

AnyImage = TypeVar("AnyImage")
"""A NumPy array, a PIL image, a LoadedImage, or an array of another library."""

__all__ = [
    "Forecast",
    "Handle",
    "JobProgress",
    "OnStep",
    "Options",
    "Progress",
    "SamplingStep",
    "Statistics",
    "Upscaler",
]


class Upscaler:
    """Super-resolution with one engine. Threads may share it, and their images are then processed together.

    Processes may not share it: after a fork, open an Upscaler in the child. An Upscaler that was not used
    before the fork may be used in the child as well, if it runs on a CPU.
    """

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
        """Open an engine directory, a bundled engine, or one of the Hugging Face hub.

        The names of bundled engines are "demo-x4" (as for None) and "demo-x8". An engine of the hub is named
        "hf://owner/name@revision"; see `from_pretrained`.
        `backend` "auto" takes the fastest one, as measured once per engine and machine.
        `threads` and `max_batch` (tiles per run) default to the backend's choice. `verify` compares the
        hashes of the engine's files. `precision` of the arithmetic is "graph", "bf16" if the backend can, or
        "auto": the faster of the two, which is also the default for an engine in bf16. `cache` is the
        directory that keeps prepared graphs, by default in the user's cache; with False a CPU keeps none.
        With `cuda_graphs` False a GPU launches kernels one by one. Raises EngineError or UsageError. Graphs
        are loaded when they are first needed.
        """
        opened = OpenedEngine(
            engine,
            backend=backend,
            device=device,
            threads=threads,
            verify=verify,
            max_batch=max_batch,
            precision=precision,
            cache=cache,
            cuda_graphs=cuda_graphs,
        )
        self._use(opened)

    def _use(self, opened: OpenedEngine) -> None:
        """Super-resolve with an opened engine."""
        self._engine, self.directory, self.manifest = opened, opened.directory, opened.manifest
        self.backend, self.measured = opened.backend, opened.measured
        self._costs, self._worker, self._admission = opened.costs, opened.worker, opened.admission
        identity = _identity(self.manifest, self.backend)
        saved = SavedLatents(opened.cache, identity) if opened.cache else None
        self._pipeline = Pipeline(self._worker, self._admission, self._costs, saved)
        self._release = weakref.finalize(self, self._pipeline.close)

    @classmethod
    def from_pretrained(cls, name: str, *, revision: str | None = None, **options: Any) -> Upscaler:
        """Open the engine in the repository "owner/name" of the Hugging Face hub; options as for `Upscaler`.

        `revision` is a branch (by default main), a tag or a commit. The files are downloaded into the cache
        of the library huggingface_hub (extra `hub`), and `HF_TOKEN`, `HF_HUB_OFFLINE` and its other variables
        apply. Raises EngineError if the engine cannot be downloaded, and UsageError for a wrong name.
        """
        return cls(name_of(name, revision), **options)

    @property
    def origin(self) -> str:
        """The repository and commit of an engine of the hub, as hf://owner/name@commit; "" for another."""
        return origin_of(self.directory)

    def __enter__(self) -> Upscaler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the graphs. Images in flight, and further calls, end with UsageError."""
        if self._release.alive:
            self._engine.keep_costs()
        self._release()

    def __call__(
        self,
        image: AnyImage,
        *,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
        stream: Any = None,
        **options: Unpack[Options],
    ) -> AnyImage:
        """Super-resolve one image: a uint8 or uint16 array HxW or HxWx{1,2,3,4}, or a PIL image of any mode.

        Returns the same kind, dtype and channels (grey stays grey, alpha is kept), `scale` times the size;
        PIL images come back as L, LA, RGB, RGBA or I;16. For the options see `Options`. `progress` is called
        from this thread during the work; an exception that it raises cancels the image and is raised here,
        and so does Ctrl-C. `on_step` is called in the same way after every sampling step, with a
        `SamplingStep` that has the latents and draws a preview; the image waits for it, other images do not.
        To cancel from another thread, or to set a time limit, use `submit`. Raises
        InputError, UsageError, MemoryLimitError or EngineError.

        Arrays of other libraries that have DLPack or `__cuda_array_interface__` (PyTorch, CuPy, PyCUDA,
        Numba) give arrays of the same library, on the CPU or on the GPU that this computes on. They are
        [H, W, C], or a batch [B, C, H, W], of uint8, uint16, or float16 or float32 of 0 to 1, as NumPy arrays
        may be too. On a GPU nothing passes through the host. There the image is read after all work that is
        on `stream` (by default the current stream of PyTorch or CuPy, else the default stream), and must
        not be changed before the result is there. If a `stream` is given, the host does not wait: the result
        is ready for work on that stream.
        """
        try:
            batch = batch_of(image, self._place, stream)
        except MoesrError:
            batch = None  # the error is raised below, after those of the options
        if batch is None:
            return next(self.map([image], progress=progress, on_step=on_step, stream=stream, **options))
        return batch.whole(list(self.map(batch.images, progress=progress, on_step=on_step, **options)))

    def submit(
        self, image: AnyImage, *, priority: str = "normal", stream: Any = None, **options: Unpack[Options]
    ) -> Handle[AnyImage]:
        """Begin to super-resolve one image and return its handle at once; image and options as for a call.

        The handle is a `concurrent.futures.Future` that can be cancelled while the image is worked on:

            handle = up.submit(image, steps=50)
            handle.preview()  # a small picture of the present step, once one was asked for
            handle.progress  # JobProgress(fraction=0.3, stage="sampling", seconds_left=4.2, position=0)
            sr = handle.result(timeout=60)  # after 60 s a TimeoutError, but the work continues
            handle.cancel()  # the work stops at the next tick, and its memory is free

        In asyncio, a time limit cancels the work:

            sr = await asyncio.wait_for(asyncio.wrap_future(up.submit(image)), timeout=60)

        (Cancelling `asyncio.to_thread(up, image)` has no effect on the work.)

        Images share the machine fairly by estimated seconds, so a small image does not wait for a large one
        to finish. An image of `priority` "high" gets four times the share of a "normal" one, which gets four
        times the share of a "low" one. Images that do not fit into memory yet wait in order, except that an
        image of higher priority passes at most 16 others. Any number of images can be submitted; the caller's
        image is kept, and must not be changed, until it is prepared.

        Raises UsageError for a wrong option or if this Upscaler is closed. Whatever is wrong with the image
        (InputError, MemoryLimitError, EngineError) is raised by the handle.
        """
        settings = self._settings(options)
        return self._submit(image, settings=settings, flow=_flow(priority), stream=stream)[1]

    def map(
        self,
        images: Iterable[Any],
        *,
        return_errors: bool = False,
        progress: Progress | None = None,
        begun: Callable[[Any], None] | None = None,
        on_step: OnStep | None = None,
        priority: str = "normal",
        stream: Any = None,
        **options: Unpack[Options],
    ) -> Iterator[Any]:
        """Super-resolve many images in order, several in flight; options and results as for one image.

        The next image is fetched while the previous one is processed. All images together get the share of
        the machine that a single image of `submit` gets. With `return_errors`, the MoesrError or MemoryError
        of one image is yielded in its place and the others continue; if the engine cannot be used at all, the
        error is raised. `progress` counts the images in flight and those before them; `begun` is called with
        each image when it begins to count. `on_step` is called for all images in flight, which pause until
        the next result is asked for. Closing the iterator cancels the images in flight. `stream` is
        that of all arrays on a GPU; see `Upscaler.__call__`.
        """
        settings, flow = self._settings(options), _flow(priority)
        every_step = on_step is not None
        submit = partial(self._submit, settings=settings, flow=flow, stream=stream, every_step=every_step)
        most = max(self.backend.max_batch, 2)
        results = ImageStream(self._pipeline, submit, most, return_errors, progress, begun, on_step)
        return results.results(images)

    def forecast(self, height: int, width: int, **options: Unpack[Options]) -> Forecast:
        """Estimate what an image of this size will take, before any work; options as for a call."""
        settings = self._settings(options)
        layout = settings.layout(self.manifest, height, width)
        needed, free = self._admission.expected(layout, settings)
        spooled = forms(layout)[0]
        seconds = self._costs.seconds(planned_tiles(layout, settings)) if self._costs.grounded else None
        disk = disk_bytes(layout, np.dtype(np.uint8), 3) if spooled else 0
        return Forecast(seconds, needed, free, disk)

    @property
    def timed(self) -> bool:
        """True if estimates of seconds rest on a measurement."""
        return self._costs.grounded

    @property
    def statistics(self) -> Statistics:
        """Return counts of images and ticks, for monitoring; any thread may call this."""
        return self._pipeline.statistics

    @property
    def _place(self) -> Place:
        """The processor that computes, and the scale, for arrays of callers."""
        options = self.backend.options
        return Place(None if options.kind == "cpu" else options.index, self.manifest.scale)

    def _submit(
        self, image: Any, *, settings: Settings, flow: Flow, stream: Any = None, every_step: bool = False
    ) -> InFlight:
        """Accept an image; if it cannot be used there is no ticket, and the handle has the error."""
        try:
            source = picture_of(image, self._place, stream)
            layout = settings.layout(self.manifest, *source.size)
        except (MoesrError, MemoryError) as error:
            failed = JobProgress(0.0, "failed", 0.0, 0)
            handle: Handle[Any] = Handle(lambda: failed)
            handle.set_exception(error)
            return None, handle
        return self._pipeline.submit(source, layout, settings, flow, owner=self, every_step=every_step)

    def _settings(self, options: Options) -> Settings:
        """Return the settings for these options; UsageError if this is closed or an option is wrong."""
        if self._pipeline.refusal:
            raise UsageError(self._pipeline.refusal)
        return resolve(self.manifest, **options)


def _flow(priority: str) -> Flow:
    return Flow(one_of("priority", priority, PRIORITIES))


def _identity(manifest: Manifest, backend: Backend) -> str:
    """A text that differs between engines, backends and versions whose results may differ."""
    hashes = [graph.arrangement(backend.target).sha256 for graph in manifest.graphs.values()]
    return " ".join([manifest.name, manifest.checkpoint_sha256, backend.label, backend.version, *hashes])
