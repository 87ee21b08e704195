"""The service as a process of its own, and requests to it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import numpy as np
from PIL import Image

LISTENING = re.compile(r"listening on http://([\d.]+):(\d+)")
TIMEOUT_S = 600.0  # per request


class Server:
    """A running service, by its address."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.url = f"http://{host}:{port}"

    def upscale(self, image: bytes, steps: int) -> tuple[int, np.ndarray | None]:
        """Send one image; return the status, and the pixels [H, W, 3] of a result."""
        request = urllib.request.Request(f"{self.url}/v1/upscale?steps={steps}", image)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return answer.status, np.asarray(Image.open(io.BytesIO(answer.read())))
        except urllib.error.HTTPError as error:
            return error.code, None

    def metrics(self) -> dict[str, float]:
        """Return the values of all metrics by name, summed over their labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found


@contextmanager
def served(options: Sequence[str]) -> Iterator[Server]:
    """Run `moesr-serve` with these options on a free port of this machine, within a `with` block."""
    command = [sys.executable, "-m", "moesr.runtime.serve.cli", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := LISTENING.search(line):
                break
        else:
            raise SystemExit("".join(lines))
        threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
        try:
            yield Server(found[1], int(found[2]))
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


class Background:
    """Something that runs in a thread of its own during a `with` block, until `_stop` is set."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        raise NotImplementedError


class Watch(Background):
    """Samples the memory of the server's process about once per second."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.samples: list[tuple[float, float]] = []  # seconds since the start, megabytes
        self._server, self._begin = server, time.monotonic()

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            try:
                resident = self._server.metrics()["moesr_resident_bytes"]
            except OSError:  # hostile clients hold all connections at this moment
                continue
            self.samples.append((time.monotonic() - self._begin, resident / 1e6))
