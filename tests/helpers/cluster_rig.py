"""A cluster of two nodes on this machine, and an S3 server, for tests and for the commands of the docs."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moesr.runtime.cluster.worker import SCRATCH

RNG = np.random.default_rng(25)

STORE_BYTES = 80 << 20  # Ray's object store, per node


SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # a token of an earlier local cluster may lie in ~/.ray
    "RAY_worker_niceness": "0",  # with the default of 15, workers stand still beside other programs
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # with the default of 5 s, a busy machine has no proxy
}
"""Environment variables of the clusters."""


class Nodes:
    """Two nodes of one core each; the first is the head. Sockets lie in a directory with a short path."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
        os.environ |= {"RAY_TMPDIR": self.folder, **SETTINGS}
        head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self.cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self.second = self._add()

    @property
    def address(self) -> str:
        return self.cluster.address

    def _add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def remove(self) -> None:
        """Kill the second node with all its processes, without a farewell."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def restore(self) -> None:
        """Start a second node again if it was removed."""
        self.second = self.second or self._add()

    def close(self) -> None:
        self.cluster.shutdown()
        os.environ.pop("RAY_TMPDIR", None)
        shutil.rmtree(self.folder, ignore_errors=True)


WORKER, LEDGER, TILE_RUNNER = "ray::MapWorker", "ray::Ledger", "ray::TileRunner"
"""Titles of the processes of our actors."""


def pids_of(title: str) -> list[int]:
    """Return the processes whose command line has this title."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if title.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def kill_a_worker(patience_s: float = 60.0) -> int:
    """Kill a worker that has an input in work, and return its process."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        for pid in pids_of(WORKER):
            if any(SCRATCH.glob(f".moesr-*-{pid}-*.tmp/in/*")):
                os.kill(pid, signal.SIGKILL)
                return pid
        time.sleep(0.01)
    raise TimeoutError("no worker has an input in work")


def ray_processes(folder: str) -> dict[int, str]:
    """Command lines, by number, of Ray's processes whose sockets or environment are in `folder`."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
            mentions = folder.encode() in line or folder.encode() in (entry / "environ").read_bytes()
            if b"ray" in line and mentions and int(entry.name) not in (os.getpid(), os.getppid()):
                found[int(entry.name)] = line.decode(errors="replace")
    return found


def left_over(folder: str, patience_s: float = 20.0) -> dict[int, str]:
    """Return the processes that are still there after a while: a worker ends when it misses its node."""
    deadline = time.monotonic() + patience_s
    while (found := ray_processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def stop(folder: str) -> None:
    """As `ray stop`, which ends the processes of every cluster of the machine, but for one cluster."""
    deadline = time.monotonic() + 20
    while (left := ray_processes(folder)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM if time.monotonic() < deadline - 10 else signal.SIGKILL)
        time.sleep(0.2)


@contextlib.contextmanager
def when(condition: Callable[[], bool], action: Callable[[], object]) -> Iterator[list[object]]:
    """Take an action in another thread once a condition holds, during a `with` block; yields its result."""
    results: list[object] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            if condition():
                results.append(action())
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield results
    finally:
        over.set()
        thread.join()


class UnsteadyProxy(ThreadingHTTPServer):
    """Passes requests on to an object store, notes them, and can answer 503 to some of them."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target = urllib.parse.urlsplit(target)
        self.requests: list[tuple[str, str]] = []  # commands and paths
        self.refused = 0
        self._planned = self._left = 0
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def refuse_after_next_put(self, count: int) -> None:
        """Answer 503 to the `count` requests that follow the next PUT."""
        with self._lock:
            self._planned, self._left, self.refused = count, 0, 0

    def accepts(self, command: str, path: str) -> bool:
        """Note a request and return whether it is passed on."""
        with self._lock:
            self.requests.append((command, path))
            refused = self._left > 0
            if refused:
                self._left, self.refused = self._left - 1, self.refused + 1
            elif command == "PUT":
                self._planned, self._left = 0, self._planned
            return not refused

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that go away, as killed workers do; print other errors."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UnsteadyProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.server.accepts(self.command, self.path):
            self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
            return
        connection = http.client.HTTPConnection(self.server.target.netloc)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        self._answer(answer.status, answer.getheaders(), answer.read())
        connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        kept = [(k, v) for k, v in headers if k.lower() not in ("transfer-encoding", "connection")]
        if not any(name.lower() == "content-length" for name, _ in kept):
            kept.append(("Content-Length", str(len(body))))
        for name, value in kept:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""


def picture(path: Path, width: int = 12, height: int = 9) -> Path:
    """Write an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def tree(folder: Path) -> list[str]:
    """The files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def has_results(folder: Path, count: int = 1) -> Callable[[], bool]:
    """A condition: so many files are below a folder."""
    return lambda: len(tree(folder)) >= count
