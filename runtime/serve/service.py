"""The service behind the routes: engines, the queue, and the processing of images.

Everything here runs in the event loop's thread, except that images are decoded and encoded in a small pool of
threads. The sampling loop runs in each Upscaler's own thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesr.runtime.cli.batch import describe
from moesr.runtime.images import reading, writing
from moesr.runtime.serve.limits import Limits
from moesr.runtime.serve.metrics import Metrics
from moesr.runtime.serve.problems import Problem, of_error
from moesr.runtime.serve.store import Job, Store
from moesr.runtime.serve.upload import SUFFIXES, settings_of
from moesr.runtime.system.files import sha256_of
from moesr.runtime.upscaler import Handle, JobProgress, Upscaler

POOL = 4  # number of threads that decode and encode
DECODED = 8  # number of decoded images held at the same time; the others wait as files
WAITING = JobProgress(0.0, "queued", 0.0, 0)

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


class Service:
    """Accepts images and jobs and processes them."""

    def __init__(self, engines: Mapping[str, Upscaler], store: Store, limits: Limits) -> None:
        self.engines, self.store, self.limits = dict(engines), store, limits
        self.metrics = Metrics(self.engines, lambda: self.in_queue, self._stages)
        self.closing = False
        self.in_queue = 0  # number of images that wait or run
        self.running: dict[str, Running] = {}  # jobs by identifier
        self._pool = ThreadPoolExecutor(POOL, thread_name_prefix="moesr-serve")
        self._decoded = asyncio.Semaphore(DECODED)
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Continue the jobs that an earlier process accepted, and begin to remove old results."""
        for job in await asyncio.to_thread(lambda: list(self.store.jobs())):
            if job.ended is None:
                log.info("job %s continues", job.id)
                self.reserve()
                self.begin(job)
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self, grace_s: float) -> None:
        """Finish the running images within `grace_s` seconds; all others stay on disk for the next start."""
        self.closing = True
        if self._sweeper:
            self._sweeper.cancel()
        waiting = [one for one in self.running.values() if one.handle is None]
        for one in waiting:
            one.task.cancel()
        tasks = [one.task for one in self.running.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        for one in list(self.running.values()):
            one.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pool.shutdown(cancel_futures=True)

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
            raise Problem(503, "the service is shutting down; try again later", {"Retry-After": "30"})
        if self.in_queue >= self.limits.queue:
            self.metrics.rejected.inc()
            wait = str(self.retry_after())
            raise Problem(503, f"the queue is full; try again in {wait} seconds", {"Retry-After": wait})

    def retry_after(self) -> int:
        """Return the seconds until a place in the queue is likely: the time until the first job ends."""
        left = [one.progress.seconds_left for one in self.running.values() if one.handle]
        return int(min(max(min(left, default=5.0), 1.0), 600.0))

    async def upscale(
        self, path: Path, options: Mapping[str, Any], target: Path, running: Running | None = None
    ) -> None:
        """Super-resolve the image file `path` into the file `target`.

        If this task is canceled, so is the image.
        """
        upscaler = self.engines[options["engine"]]
        settings = settings_of(options)
        loop, begin = asyncio.get_running_loop(), time.monotonic()
        async with self._decoded:
            loaded = await loop.run_in_executor(self._pool, reading.load, path)
            handle = upscaler.submit(loaded, priority=options.get("priority", "normal"), **settings)
            if running:
                running.handle = handle
            try:
                result = await asyncio.wrap_future(handle)
            except asyncio.CancelledError:
                handle.cancel()
                self.metrics.cancelled.inc()
                raise
            digest = await loop.run_in_executor(self._pool, sha256_of, path)
            record = describe(upscaler.manifest, settings).of("upload", digest)
            await loop.run_in_executor(
                self._pool, lambda: writing.save(target, result, record, options.get("quality"))
            )
        self.metrics.seconds.labels(options["engine"]).observe(time.monotonic() - begin)

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
            await self.upscale(job.input, job.options, job.result, self.running.get(job.id))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            problem = of_error(error)
            if problem.status >= 500:
                log.error("job %s: %s", job.id, error, exc_info=problem.detail.startswith("internal"))
            self.metrics.failed.inc()
            await asyncio.to_thread(job.fail, problem)

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
        one = self.running.get(job.id)
        error, ended = (None, None) if one else (job.error, job.ended)  # no file is read for running jobs
        values: dict[str, Any] = {
            "id": job.id,
            "status": "failed" if error else "done" if ended else "queued",
            "width": job.width,
            "height": job.height,
            "options": job.options,
            "accepted": job.accepted,
        }
        if error:
            values["problem"] = error
        elif ended is None:
            progress = one.progress if one else WAITING
            values |= {
                "status": "running" if progress.stage not in ("queued", "waiting") else "queued",
                "stage": progress.stage,
                "fraction": round(progress.fraction, 4),
                "seconds_left": round(progress.seconds_left, 1),
                "position": progress.position or self._position(job),
            }
        else:
            values |= {
                "fraction": 1.0,
                "media_type": job.media_type,
                "suffix": SUFFIXES[job.options["format"]],
            }
        return values

    def _stages(self) -> list[str]:
        """Return the stage of every job in work."""
        return [one.progress.stage for one in self.running.values()]

    def _position(self, job: Job) -> int:
        """Return the position among the jobs that have no handle yet: 1 is the next one.

        0 if the job has one.
        """
        waiting = [name for name, one in self.running.items() if one.handle is None]
        return waiting.index(job.id) + 1 if job.id in waiting else 0
