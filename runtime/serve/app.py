"""The routes of the service: images, jobs, the state of the service, and the page."""

from __future__ import annotations

import asyncio
import json
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

from moesr.runtime.errors import UsageError
from moesr.runtime.loop.job import PRIORITIES
from moesr.runtime.loop.settings import resolve
from moesr.runtime.serve import documentation
from moesr.runtime.serve.guard import Guard
from moesr.runtime.serve.limits import check_header
from moesr.runtime.serve.problems import MEDIA_TYPE, Problem, of_error
from moesr.runtime.serve.service import Service
from moesr.runtime.serve.store import INPUT, Job
from moesr.runtime.serve.upload import FORMATS, SUFFIXES, check_options, receive, settings_of

STATIC = Path(__file__).parent / "static"
EVENT_S = 0.25  # seconds between two checks of a job's progress


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
        await service.stop(service.limits.grace_s)

    app = FastAPI(
        title="moesr",
        description=documentation.ABOUT,
        lifespan=lifespan,
        docs_url=None,  # the page of the framework loads scripts from other servers
        redoc_url=None,
        openapi_url="/v1/openapi.json",
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


async def _answer(_: Request, error: Exception) -> Response:
    """Return an error as problem details."""
    if isinstance(error, HTTPException):
        problem = Problem(error.status_code, str(error.detail), dict(error.headers or {}))
    elif isinstance(error, RequestValidationError):
        problem = Problem(400, "the request does not have the form that /v1/openapi.json describes")
    else:
        problem = of_error(error)
    return JSONResponse(problem.body(), problem.status, problem.headers, MEDIA_TYPE)


async def _received(request: Request, service: Service) -> Received:
    """Read and check a whole request. If anything is wrong with it, its files are removed."""
    service.check_room()
    directory = service.store.incoming()
    try:
        given = await receive(request, directory / INPUT, service.limits)
        options = check_options(given, request.headers.get("accept", ""), service.engines)
        _check_settings(service, options)
        size = await asyncio.to_thread(check_header, directory / INPUT, service.limits)
        return Received(directory, options, size)
    except BaseException:
        service.store.discard(directory)
        raise


def _check_settings(service: Service, options: dict[str, Any]) -> None:
    """Raise Problem 400 if the engine does not support the options."""
    if options.get("priority", "normal") not in PRIORITIES:
        raise Problem(400, f"priority is expected to be one of {', '.join(PRIORITIES)}")
    try:
        resolve(service.engines[options["engine"]].manifest, **settings_of(options))
    except UsageError as error:
        raise of_error(error) from None


def _add_image_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/upscale", **documentation.UPSCALE)
    async def upscale(request: Request) -> Response:
        received = await _received(request, service)
        target = received.directory / f"result{SUFFIXES[received.options['format']]}"
        try:
            async with service.slot():
                work = asyncio.create_task(
                    service.upscale(received.directory / INPUT, received.options, target)
                )
                await _unless_gone(request, work, service.limits.request_s)
        except BaseException as error:
            service.store.discard(received.directory)
            if isinstance(error, Exception):
                raise of_error(error) from error
            raise
        removal = BackgroundTask(service.store.discard, received.directory)
        return FileResponse(target, media_type=FORMATS[received.options["format"]], background=removal)


async def _unless_gone(request: Request, work: asyncio.Task[None], limit_s: float) -> None:
    """Wait for the work; cancel it if the client disconnects or the time is over."""
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((work, gone), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            await work
        elif gone.done():
            raise Problem(400, "the client disconnected")
        else:
            raise Problem(504, f"the image took longer than {limit_s:.0f} seconds; send it to /v1/jobs")
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
        received = await _received(request, service)
        try:
            service.check_room()
        except Problem:
            service.store.discard(received.directory)
            raise
        service.reserve()
        try:
            job = await asyncio.to_thread(
                service.store.accept, received.directory, received.options, received.size
            )
        except BaseException:
            service.release()
            service.store.discard(received.directory)
            raise
        service.begin(job)
        headers = {"Location": f"/v1/jobs/{job.id}"}
        return JSONResponse(service.status(job), 202, headers)

    @app.get("/v1/jobs/{job_id}", **documentation.STATUS)
    async def status(job_id: str) -> dict[str, Any]:
        return service.status(_found(service, job_id))

    @app.get("/v1/jobs/{job_id}/events", **documentation.EVENTS)
    async def events(request: Request, job_id: str) -> EventSourceResponse:
        return EventSourceResponse(_events(request, service, _found(service, job_id)))

    @app.get("/v1/jobs/{job_id}/result", **documentation.RESULT)
    async def result(job_id: str) -> Response:
        job = _found(service, job_id)
        if error := job.error:
            return JSONResponse(error, error.get("status", 500), media_type=MEDIA_TYPE)
        if job.ended is None:
            raise Problem(409, "the job is not done yet", {"Retry-After": str(service.retry_after())})
        return FileResponse(job.result, media_type=job.media_type)

    @app.delete("/v1/jobs/{job_id}", status_code=204, **documentation.CANCEL)
    async def cancel(job_id: str) -> Response:
        await service.cancel(_found(service, job_id))
        return Response(status_code=204)


def _found(service: Service, job_id: str) -> Job:
    job = service.store.find(job_id)
    if job is None:
        raise Problem(404, "no such job; it may have been cancelled, or its result has expired")
    return job


async def _events(request: Request, service: Service, job: Job) -> AsyncIterator[dict[str, str]]:
    """Yield the status of a job whenever it changes, until the job ends."""
    before = None
    while not service.closing:
        known = await asyncio.to_thread(service.store.find, job.id)
        if known is None:
            yield {"event": "cancelled", "data": "{}"}
            return
        status = service.status(known)
        if status != before:
            yield {"event": status["status"], "data": json.dumps(status)}
        if status["status"] in ("done", "failed"):
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
