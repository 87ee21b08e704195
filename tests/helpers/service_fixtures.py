"""A service over a tiny engine, in this process or in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from moesr.runtime import Upscaler


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engines import build_engine

    return build_engine(tmp_path_factory.mktemp("serve") / "engine")


@pytest.fixture(scope="session")
def tiny_upscaler(tiny_engine: Path) -> Iterator[Upscaler]:
    from moesr.runtime import Upscaler

    with Upscaler(tiny_engine, threads=1) as up:
        yield up


@pytest.fixture
def serve(tiny_upscaler: Upscaler, tmp_path: Path) -> Callable:
    """Return a function that makes a client of a service: `with serve(queue=1) as client`."""

    from fastapi.testclient import TestClient

    from moesr.runtime.serve.app import make_app
    from moesr.runtime.serve.limits import Limits
    from moesr.runtime.serve.service import Service
    from moesr.runtime.serve.store import Store

    @contextmanager
    def make(token: str | None = None, **limits: float) -> Iterator[TestClient]:
        service = Service({"tiny": tiny_upscaler}, Store(tmp_path / "state"), Limits(**limits))
        with TestClient(make_app(service, token), raise_server_exceptions=False) as client:
            client.service = service  # type: ignore[attr-defined]
            yield client

    return make


class Process:
    """A process that runs `moesr-serve`."""

    def __init__(self, engine: Path, state: Path, *options: str) -> None:
        command = [sys.executable, "-m", "moesr.runtime.serve.cli"]
        command += [] if "--engine" in options else ["--engine", f"tiny={engine}"]
        command += ["--port", "0", "--state", str(state), "--threads", "1", *options]
        self.log = state.parent / "serve.log"
        self._out = self.log.open("a")
        begin = self.log.stat().st_size
        self.process = subprocess.Popen(command, stderr=self._out, stdout=self._out, env=dict(os.environ))
        limit = time.monotonic() + 120
        while not (found := re.search(r"listening on (http://[\w.:\[\]]+)", self.text()[begin:])):
            assert self.process.poll() is None and time.monotonic() < limit, self.text()
            time.sleep(0.05)
        self.url = found[1]
        import httpx

        self.client = httpx.Client(base_url=self.url, timeout=120)

    def text(self) -> str:
        return self.log.read_text()

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(120)
        self.client.close()
        self._out.close()
        return code


@pytest.fixture(scope="module")
def strict_process(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for the tests of a module, in which a connection may be silent for half a second."""
    state = tmp_path_factory.mktemp("strict") / "state"
    state.mkdir()
    one = Process(tiny_engine, state, "--idle", "0.5", "--max-upload", "0.2", "--connections", "50")
    yield one
    one.stop(signal.SIGKILL)


@pytest.fixture
def process(tiny_engine: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Yield a function that starts servers with one state directory, and kill those that are left."""
    made: list[Process] = []

    def start(*options: str) -> Process:
        made.append(Process(tiny_engine, tmp_path / "state", *options))
        return made[-1]

    (tmp_path / "state").mkdir()
    yield start
    for one in made:
        if one.process.poll() is None:
            one.stop(signal.SIGKILL)
