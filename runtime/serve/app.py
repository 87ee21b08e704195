"""The routes of the service: images, jobs, the state of the service, and the page."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from sse_starlette import EventSourceResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from moesr.runtime.errors import UsageError
from moesr.runtime.images.writing import check_output
from moesr.runtime.loop.settings import resolve
from moesr.runtime.loop.work import PRIORITIES
from moesr.runtime.serve import documentation
from moesr.runtime.serve.arrivals import closing
from moesr.runtime.serve.guard import HEAD, Guard
from moesr.runtime.serve.limits import check_header
from moesr.runtime.serve.problems import MEDIA_TYPE, Problem, of_error
from moesr.runtime.serve.result_format import FORMATS, SUFFIXES, choose
from moesr.runtime.serve.service import Service, Work
from moesr.runtime.serve.store import INPUT, Job
from moesr.runtime.serve.upload import check_options, receive, settings_of

log = logging.getLogger("moesr")

STATIC = Path(__file__).parent / "static"
EVENT_S = 0.25  # seconds between two checks of a job's progress
LAST_EVENT = "end"  # identifier of the event with which a job ends
GONE = "no such job; it may have been cancelled, or its result has expired"


@dataclass
class Received:
    """A complete and valid request: its directory, its options, and the image's size in pixels."""

    directory: Path
    options: dict[str, Any]
    size: tuple[int, int]


def make_app(service: Service, token: str | None = None) -> FastAPI:
    """Make the application; with a `token`, every request to /v1 and /metrics must carry it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="moesr",
        description=documentation.ABOUT,
        lifespan=lifespan,
        docs_url=None,  # the page of the framework loads scripts from other servers
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        redirect_slashes=False,  # a redirect would lead to whatever host the client names
    )
    app.state.service = service
    app.add_middleware(Guard, service=service, token=token)
    app.exception_handler(Problem)(_answer)
    app.exception_handler(HTTPException)(_answer)
    app.exception_handler(RequestValidationError)(_answer)
    app.exception_handler(Exception)(_answer)
    _add_image_routes(app, service)
    _add_job_routes(app, service)
    _add_state_routes(app, service)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


async def _answer(request: Request, error: Exception) -> Response:
    """Return an error as problem details."""
    if isinstance(error, HTTPException):
        problem = Problem(error.status_code, str(error.detail), dict(error.headers or {}))
        if problem.status == 405:
            problem.headers["Allow"] = ", ".join(_methods(request))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=problem.headers)
    elif isinstance(error, RequestValidationError):
        problem = Problem(400, "the request does not have the form that /v1/openapi.json describes")
    else:
        problem = of_error(error)
        if problem.status in (500, 507) and (cause := error.__cause__):
            log.error("%s %s: %s: %s", request.method, request.url.path, type(cause).__name__, cause)
    return JSONResponse(problem.body(), problem.status, problem.headers, MEDIA_TYPE)


def _methods(request: Request) -> list[str]:
    """Return the methods that the address of a request supports."""
    found = {"OPTIONS"}
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted(found | {"HEAD"} if "GET" in found else found)


async def _received(request: Request, service: Service, *, job: bool) -> Received:
    """Read and check a whole request. If anything is wrong with it, its files are removed."""
    service.check_room()
    begin, headers = time.monotonic(), request.headers
    with service.arrivals.request(headers.get("content-length")) as arrival:
        directory = await asyncio.to_thread(service.store.incoming)
        try:
            given = await receive(request, directory / INPUT, arrival)
            options = check_options(given, service.engines)
            options["format"] = choose(options.get("format"), headers.get("accept", ""), described=job)
            size = await asyncio.to_thread(check_header, directory / INPUT, service.limits)
            _check_settings(service, options, size)
        except BaseException:
            await asyncio.to_thread(service.store.discard, directory)
            raise
    service.metrics.stage(options["engine"], "receiving", time.monotonic() - begin)
    return Received(directory, options, size)


def _check_settings(service: Service, options: dict[str, Any], size: tuple[int, int]) -> None:
    """Raise Problem 400 if the engine does not support the options, or the format the size of the result."""
    if options.get("priority", "normal") not in PRIORITIES:
        raise Problem(400, f"priority is expected to be one of {', '.join(PRIORITIES)}")
    manifest = service.engines[options["engine"]].manifest
    try:
        resolve(manifest, **settings_of(options))
        check_output(Path(f"result{SUFFIXES[options['format']]}"), *(side * manifest.scale for side in size))
    except UsageError as error:
        raise of_error(error) from None


def _add_image_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/upscale", **documentation.UPSCALE)
    async def upscale(request: Request) -> Response:
        received = await _received(request, service, job=False)
        target = received.directory / f"result{SUFFIXES[received.options['format']]}"
        try:
            async with service.slot():
                work = Work(received.directory / INPUT, target, received.options, received.size)
                await _unless_over(request, service, asyncio.create_task(service.upscale(work)))
        except BaseException as error:
            await asyncio.to_thread(service.store.discard, received.directory)
            if isinstance(error, Exception):
                raise of_error(error) from error
            raise
        removal = BackgroundTask(service.store.discard, received.directory)
        return FileResponse(target, media_type=FORMATS[received.options["format"]], background=removal)


async def _unless_over(request: Request, service: Service, work: asyncio.Task[None]) -> None:
    """Wait for the work; cancel it if the client disconnects or its time or the grace is over."""
    gone, limit_s = asyncio.create_task(_disconnected(request)), service.limits.request_s
    end = time.monotonic() + limit_s
    try:
        while not work.done():
            await asyncio.wait((work, gone), timeout=EVENT_S, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                break
            if gone.done():
                raise Problem(400, "the client disconnected")
            if time.monotonic() >= end:
                raise Problem(504, f"the image took longer than {limit_s:g} seconds; send it to /v1/jobs")
            if service.grace_left() <= 0.0:
                raise closing()
        await work
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Return when the client has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(EVENT_S)


def _add_job_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/jobs", status_code=202, **documentation.SUBMIT)
    async def submit(request: Request) -> Response:
        received = await _received(request, service, job=True)
        accepting = service.accept(received.directory, received.options, received.size)
        try:
            job = await asyncio.shield(asyncio.create_task(accepting))
        except Exception:
            await asyncio.to_thread(service.store.discard, received.directory)
            raise
        return JSONResponse(service.status(job), 202, {"Location": f"/v1/jobs/{job.id}"})

    @app.get("/v1/jobs/{job_id}", **documentation.STATUS)
    async def status(job_id: str) -> dict[str, Any]:
        return service.status(_found(service, job_id))

    @app.get("/v1/jobs/{job_id}/events", **documentation.EVENTS)
    async def events(request: Request, job_id: str) -> Response:
        last = request.headers.get("last-event-id", "")
        if last == LAST_EVENT:
            return Response(status_code=204)  # tells an EventSource not to connect again
        job = _found(service, job_id)
        if request.scope.get(HEAD):
            return Response(media_type="text/event-stream")
        first = int(last) + 1 if last.isascii() and last.isdecimal() and len(last) < 10 else 1
        return EventSourceResponse(_events(service, job, first))

    @app.get("/v1/jobs/{job_id}/result", **documentation.RESULT)
    async def result(job_id: str) -> Response:
        job = _found(service, job_id)
        if error := job.error:
            return JSONResponse(error, error.get("status", 500), media_type=MEDIA_TYPE)
        if job.ended is None:
            raise Problem(409, "the job is not done yet", {"Retry-After": str(service.retry_after())})
        try:
            known = await asyncio.to_thread(job.result.stat)
        except OSError:
            raise Problem(404, GONE) from None
        return FileResponse(job.result, media_type=job.media_type, stat_result=known)

    @app.get("/v1/jobs/{job_id}/preview", **documentation.PREVIEW)
    async def preview(job_id: str) -> Response:
        drawn = await service.preview(_found(service, job_id))
        return Response(drawn, media_type="image/jpeg") if drawn else Response(status_code=204)

    @app.delete("/v1/jobs/{job_id}", status_code=204, **documentation.CANCEL)
    async def cancel(job_id: str) -> Response:
        await service.cancel(_found(service, job_id))
        return Response(status_code=204)


def _found(service: Service, job_id: str) -> Job:
    job = service.store.jobs.get(job_id)
    if job is None:
        raise Problem(404, GONE)
    return job


async def _events(service: Service, job: Job, number: int) -> AsyncIterator[dict[str, str]]:
    """Yield the status of a job whenever it changes, until it ends; the first event has this `number`."""
    before = None
    while not service.closing:
        if job.id not in service.store.jobs:
            yield {"event": "cancelled", "data": "{}", "id": LAST_EVENT}
            return
        status = service.status(job)
        over = status["status"] in ("done", "failed")
        if status != before:
            name = LAST_EVENT if over else str(number)
            yield {"event": status["status"], "data": json.dumps(status), "id": name}
            number += 1
        if over:
            return
        before = status
        await asyncio.sleep(EVENT_S)


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", **documentation.HEALTH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", **documentation.READY)
    async def ready() -> Response:
        engines = {
            name: {"backend": up.backend.label, "loaded": list(up.statistics.loaded)}
            for name, up in service.engines.items()
        }
        values = {"status": "closing" if service.closing else "ready", "engines": engines}
        return JSONResponse(values, 503 if service.closing else 200)

    @app.get("/v1/engines", **documentation.ENGINES)
    async def engines() -> list[dict[str, Any]]:
        return [documentation.facts(name, up) for name, up in service.engines.items()]

    @app.get("/metrics", **documentation.METRICS)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", media_type="text/html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return RedirectResponse("/static/icon.svg")
