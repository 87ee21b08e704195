"""The service on a cluster: a Ray Serve application whose replicas are the service's own process.

    serve run docs/serving/ray-serve.yaml

Ray Serve takes requests, routes them, and starts and stops replicas by the number of requests. Each replica
runs the server of `moesr-serve` with a Store of its own below the state directory, which all nodes share. A
request about a job goes on to the replica that has the job.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from moesr.runtime.cluster.engines import engine_on_this_node, name_for_nodes
from moesr.runtime.cluster.places import missing
from moesr.runtime.errors import OutputError, UsageError
from moesr.runtime.serve.app import make_app
from moesr.runtime.serve.cli import named_engines, read_token
from moesr.runtime.serve.limits import Limits
from moesr.runtime.serve.problems import MEDIA_TYPE, Problem
from moesr.runtime.serve.server import listen, server_of
from moesr.runtime.serve.service import Service
from moesr.runtime.serve.store import Store
from moesr.runtime.system.files import write_atomically
from moesr.runtime.upscaler import Upscaler

try:
    import aiohttp
    import ray
    import uvicorn
    from ray import serve
except ImportError as error:
    raise missing(error.name or "ray[serve]", "ray-serve") from error

ADDRESS = "address"
"""The file in the state directory of a replica with the address of its server."""

HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
"""Headers that concern one connection only."""


@dataclass(frozen=True)
class Settings:
    """The arguments of the application in a configuration file of Ray Serve."""

    state: str  # a directory that all nodes share
    engines: tuple[str, ...] = ("demo-x4",)  # as for moesr-serve, or URLs
    upscaler: Mapping[str, Any] = field(default_factory=dict)  # options of an Upscaler, such as backend
    limits: Mapping[str, Any] = field(default_factory=dict)  # see moesr.runtime.serve.limits.Limits
    token_file: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Check the arguments; UsageError names one that is unknown or lacking."""
        known = [each.name for each in fields(cls)]
        if unknown := given.keys() - set(known):
            raise UsageError(f"argument {sorted(unknown)[0]!r} is unknown, expected {', '.join(known)}")
        if not given.get("state"):
            raise UsageError("argument 'state' is missing: name a directory that all nodes share")
        return cls(**given)


@serve.deployment(name="replica", max_ongoing_requests=256)
class Replica:
    """One server with its engines."""

    def __init__(self, settings: Settings) -> None:
        """Open the engines, claim a state directory, continue the jobs in it, and listen."""
        self._root = Path(settings.state)
        self._store = claim(self._root)
        options = {"threads": _cores(), **settings.upscaler}
        engines = {
            name: Upscaler(engine_on_this_node(name_for_nodes(directory)), **options)
            for name, directory in named_engines(settings.engines).items()
        }
        limits = Limits(**settings.limits)
        token = read_token(Path(settings.token_file) if settings.token_file else None)
        service = Service(engines, self._store, limits)
        host = ray.util.get_node_ip_address()
        listening = listen(host, 0)
        self.address = f"http://{host}:{listening.getsockname()[1]}"
        self._server = uvicorn.Server(server_of(make_app(service, token), service).config)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        with write_atomically(self._store.state / ADDRESS) as stream:
            stream.write(self.address.encode())
        self._client: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> Response:
        """Pass a request on to the server that it is for, and its answer back, both as streams."""
        address = self._owner(request.url.path)
        if address is None:
            problem = Problem(503, "the replica with this job is starting again", {"Retry-After": "5"})
            return JSONResponse(problem.body(), problem.status, problem.headers, MEDIA_TYPE)
        if self._client is None:
            self._client = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
            )
        try:
            answer = await self._client.request(
                request.method,
                address + request.url.path,
                params=request.query_params.multi_items(),
                headers=[(name, value) for name, value in request.headers.items() if name not in HOP],
                data=request.stream() if _has_body(request) else None,
                allow_redirects=False,
            )
        except aiohttp.ClientConnectionError:
            problem = Problem(503, "a replica is starting again", {"Retry-After": "5"})
            return JSONResponse(problem.body(), problem.status, problem.headers, MEDIA_TYPE)
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP}
        release = BackgroundTask(answer.release)
        return StreamingResponse(_chunks(answer), answer.status, kept, background=release)

    def _owner(self, path: str) -> str | None:
        """Return the address of the server that has the job in a path; None if its replica is gone.

        For all other paths it is the address of this replica.
        """
        words = path.split("/")
        if words[:3] != ["", "v1", "jobs"] or len(words) < 4 or not words[3].isalnum():
            return self.address
        for folder in self._root.glob(f"*/jobs/{words[3]}"):
            place = folder.parents[1]
            if place == self._store.state:
                return self.address
            return _read(place / ADDRESS)
        return self.address  # which answers 404

    def check_health(self) -> None:
        """Raise RuntimeError if the server has ended; Ray Serve then replaces this replica."""
        if not self._thread.is_alive():
            raise RuntimeError("the server has ended")

    def __del__(self) -> None:
        """Let images in work finish within the grace period; the next replica continues the others."""
        if hasattr(self, "_server"):
            self._server.should_exit = True
            self._thread.join()


def claim(root: Path) -> Store:
    """Return the first state directory below `root` that no other replica uses, with the jobs in it."""
    for number in count():
        place = root / f"replica-{number}"
        try:
            store = Store(place)
        except OutputError as error:
            if "is used by another" not in str(error):
                raise
            continue
        (place / ADDRESS).unlink(missing_ok=True)
        return store
    raise AssertionError


def app(args: dict[str, Any]) -> serve.Application:
    """Build the application; `args` are those of a configuration file, see `Settings`."""
    return Replica.bind(Settings.of(args))


def _has_body(request: Request) -> bool:
    return "content-length" in request.headers or "transfer-encoding" in request.headers


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for chunk in answer.content.iter_any():
        yield chunk


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _cores() -> int:
    """Return the number of whole cores that Ray has reserved for this replica, at least one."""
    return max(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), 1)
