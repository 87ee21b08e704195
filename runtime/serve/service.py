"""The service behind the routes: engines, the queue, and the processing of images.

Everything here runs in the event loop's thread, except that images are decoded and encoded in a small pool of
threads. The sampling loop runs in each Upscaler's own thread.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from moesr.runtime.cli.batch import describe
from moesr.runtime.images import reading, writing
from moesr.runtime.serve.arrivals import Arrivals, closing
from moesr.runtime.serve.limits import Limits
from moesr.runtime.serve.metrics import Metrics
from moesr.runtime.serve.problems import Problem, of_error
from moesr.runtime.serve.result_format import SUFFIXES
from moesr.runtime.serve.store import Job, Store
from moesr.runtime.serve.upload import settings_of
from moesr.runtime.system.files import sha256_of
from moesr.runtime.upscaler import Handle, JobProgress, Upscaler

POOL = 4  # number of threads that decode and encode
DECODED = 8  # number of large decoded images held at the same time; further ones wait as files
PREVIEW_QUALITY = 85
SMALL_PX = 1_000_000  # images of up to this size do not wait for large ones
WAITING = JobProgress(0.0, "queued", 0.0, 0)

Result = TypeVar("Result")

log = logging.getLogger("moesr")


@dataclass(eq=False)
class Running:
    """A job of this process: the task that processes it, and its handle once it is submitted."""

    task: asyncio.Task[None]
    handle: Handle[Any] | None = None
    furthest: float = 0.0

    @property
    def progress(self) -> JobProgress:
        """The progress of the job. The fraction never decreases, though the estimate of the work may rise."""
        found = self.handle.progress if self.handle else WAITING
        self.furthest = max(self.furthest, found.fraction)
        return replace(found, fraction=self.furthest)


@dataclass(frozen=True)
class Work:
    """An image to super-resolve from the file `path` into the file `target`."""

    path: Path
    target: Path
    options: Mapping[str, Any]
    size: tuple[int, int]  # width and height of the image in pixels

    @property
    def engine(self) -> str:
        """The name of the engine."""
        return self.options["engine"]


class Service:
    """Accepts images and jobs and processes them."""

    def __init__(self, engines: Mapping[str, Upscaler], store: Store, limits: Limits) -> None:
        self.engines, self.store, self.limits = dict(engines), store, limits
        self.arrivals = Arrivals(limits)
        self.metrics = Metrics(self)
        self.deadline: float | None = None  # of the grace, on the clock of time.monotonic
        self.in_queue = 0  # number of images that wait or run
        self.running: dict[str, Running] = {}  # jobs by identifier
        self._pool = ThreadPoolExecutor(POOL, thread_name_prefix="moesr-serve")
        self._large = asyncio.Semaphore(DECODED)
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Continue the jobs that an earlier process accepted, and begin to remove old results."""
        for job in list(self.store.jobs.values()):
            if job.ended is None:
                log.info("job %s continues", job.id)
                self.reserve()
                self.begin(job)
        self._sweeper = asyncio.create_task(self._sweep())

    @property
    def closing(self) -> bool:
        """Whether no further image is accepted."""
        return self.deadline is not None

    def close(self) -> None:
        """Accept no further image. Images in work have the grace to finish."""
        self.arrivals.closing = True
        self.deadline = self.deadline or time.monotonic() + self.limits.grace_s

    def keep_waiting(self) -> None:
        """Stop the jobs that are not in work yet; they stay on disk for the next start."""
        for one in self.running.values():
            if one.handle is None or one.progress.fraction == 0.0:
                one.task.cancel()

    async def stop(self) -> None:
        """Finish the images in work within the grace; all others stay on disk for the next start."""
        self.close()
        if self._sweeper:
            self._sweeper.cancel()
        self.keep_waiting()
        tasks = [one.task for one in self.running.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=self.grace_left())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pool.shutdown(cancel_futures=True)
        self.store.close()

    def grace_left(self) -> float:
        """Return the seconds until images in work are canceled; infinite while the service is not closing."""
        return max(self.deadline - time.monotonic(), 0.0) if self.deadline is not None else float("inf")

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a place in the queue; Problem 503 with Retry-After if it is full or the service is closing."""
        self.check_room()
        self.reserve()
        try:
            yield
        finally:
            self.release()

    def reserve(self) -> None:
        """Take a place in the queue; must be called right after `check_room`, before anything is awaited."""
        self.in_queue += 1

    def release(self) -> None:
        """Release a place in the queue."""
        self.in_queue -= 1

    def check_room(self) -> None:
        """Raise Problem 503 if no further image can be accepted now."""
        if self.closing:
            raise closing()
        if self.in_queue >= self.limits.queue:
            wait = str(self.retry_after())
            raise Problem(503, f"the queue is full; try again in {wait} seconds", {"Retry-After": wait})

    def retry_after(self) -> int:
        """Return the seconds until a place in the queue is likely: the time until the first job ends."""
        left = [one.progress.seconds_left for one in self.running.values() if one.handle]
        return int(min(max(min(left, default=5.0), 1.0), 600.0))

    async def upscale(self, work: Work, running: Running | None = None) -> None:
        """Super-resolve an image file; if this task is canceled, so is the image."""
        large = work.size[0] * work.size[1] > SMALL_PX
        begin = time.monotonic()
        try:
            async with self._large if large else nullcontext():
                self.metrics.stage(work.engine, "queued", time.monotonic() - begin)
                await self._upscale(work, running)
            self.metrics.seconds.labels(work.engine).observe(time.monotonic() - begin)
        except asyncio.CancelledError:
            self.metrics.cancelled.inc()
            raise

    async def _upscale(self, work: Work, running: Running | None) -> None:
        upscaler, settings = self.engines[work.engine], settings_of(work.options)
        loaded = await self._in_pool(work.engine, "reading", lambda: reading.load(work.path))
        handle = upscaler.submit(loaded, priority=work.options.get("priority", "normal"), **settings)
        del loaded
        if running:
            running.handle = handle
        try:
            result = await asyncio.wrap_future(handle)
        except asyncio.CancelledError:
            handle.cancel()
            raise
        for stage, seconds in handle.progress.seconds.items():
            self.metrics.stage(work.engine, stage, seconds)

        def write() -> None:
            record = describe(upscaler.manifest, settings, upscaler.origin).of("upload", sha256_of(work.path))
            writing.save(work.target, result, record, work.options.get("quality"))
            result.written()

        await self._in_pool(work.engine, "writing", write)

    async def _in_pool(self, engine: str, stage: str, step: Callable[[], Result]) -> Result:
        """Run `step` in the pool of threads that decode and encode, and record its time."""
        begin = time.monotonic()
        done = await asyncio.get_running_loop().run_in_executor(self._pool, step)
        self.metrics.stage(engine, stage, time.monotonic() - begin)
        return done

    async def accept(self, directory: Path, options: dict[str, Any], size: tuple[int, int]) -> Job:
        """Make a received request a job and begin to process it; Problem 503 if the queue is full.

        It must not be canceled, or a job could be on disk that is not processed before the next start.
        """
        self.check_room()
        self.reserve()
        try:
            job = await asyncio.to_thread(self.store.accept, directory, options, size)
        except BaseException:
            self.release()
            raise
        self.begin(job)
        return job

    def begin(self, job: Job) -> None:
        """Begin to process an accepted job, which has a place in the queue and releases it at its end."""
        task = asyncio.create_task(self._work(job))
        self.running[job.id] = Running(task)
        task.add_done_callback(lambda _: self._ended(job))

    def _ended(self, job: Job) -> None:
        self.release()
        self.running.pop(job.id, None)

    async def _work(self, job: Job) -> None:
        """Process a job and record how it ended; a job that is canceled by `stop` stays as it is."""
        await asyncio.sleep(0)  # lets `begin` store the task
        try:
            if job.options["engine"] not in self.engines:
                raise Problem(404, f"the engine {job.options['engine']!r} is not served any more")
            work = Work(job.input, job.result, job.options, (job.width, job.height))
            await self.upscale(work, self.running.get(job.id))
            await asyncio.to_thread(self.store.finish, job)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            problem = of_error(error)
            if problem.status >= 500:
                log.error("job %s: %s", job.id, error, exc_info=problem.detail.startswith("internal"))
            self.metrics.failed.inc()
            await asyncio.to_thread(self.store.fail, job, problem)

    async def cancel(self, job: Job) -> None:
        """Cancel a job if it is not done, and remove it."""
        one = self.running.get(job.id)
        if one:
            one.task.cancel()
            await asyncio.gather(one.task, return_exceptions=True)
        await asyncio.to_thread(self.store.remove, job)

    async def _sweep(self) -> None:
        """Remove old results periodically."""
        while True:
            await asyncio.to_thread(self.store.expire, self.limits.keep_s)
            await asyncio.sleep(min(max(self.limits.keep_s / 10, 0.5), 60.0))

    def status(self, job: Job) -> dict[str, Any]:
        """Return a job as clients see it."""
        values: dict[str, Any] = {
            "id": job.id,
            "status": "failed" if job.error else "done" if job.ended else "queued",
            "width": job.width,
            "height": job.height,
            "options": job.options,
            "accepted": job.accepted,
        }
        if job.error:
            return values | {"problem": job.error}
        if job.ended:
            end = {"media_type": job.media_type, "suffix": SUFFIXES[job.options["format"]]}
            return values | {"fraction": 1.0, "seconds_left": 0.0, "ended": job.ended, **end}
        one = self.running.get(job.id)
        progress = one.progress if one else WAITING
        return values | {
            "status": "running" if progress.stage not in ("queued", "waiting") else "queued",
            "stage": progress.stage,
            "fraction": round(progress.fraction, 4),
            "seconds_left": round(progress.seconds_left, 1),
            "position": progress.position or self._position(job),
        }

    async def preview(self, job: Job) -> bytes | None:
        """Return the image of a job as far as it is sampled, as a small JPEG; None if there is none yet."""
        one = self.running.get(job.id)
        if one is None or one.handle is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._pool, _jpeg, one.handle)

    def stages(self) -> list[str]:
        """Return the stage of every job in work."""
        return [one.progress.stage for one in self.running.values()]

    def _position(self, job: Job) -> int:
        """Return the position among the jobs that have no handle yet: 1 is the next one.

        0 if the job has one.
        """
        waiting = [name for name, one in self.running.items() if one.handle is None]
        return waiting.index(job.id) + 1 if job.id in waiting else 0


def _jpeg(handle: Handle[Any]) -> bytes | None:
    """Draw the preview of an image, and ask for the next one."""
    pixels = handle.preview()
    if pixels is None:
        return None
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=PREVIEW_QUALITY)
    return stream.getvalue()
