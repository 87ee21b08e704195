"""Requests of hostile clients, and the answers to them."""

from __future__ import annotations

import http.client
import io
import socket
import struct
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress

from PIL import Image

from load_test.server import Background, Server

PAUSE_S = 0.2
"""Pause between two hostile requests."""

IDLE = 1000
"""Connections that send nothing."""

CUT = "cut off"


class Hostile(Background):
    """Sends hostile requests one after the other, repeatedly."""

    def __init__(self, server: Server, image: bytes) -> None:
        super().__init__()
        self._server, self._image = server, image
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)

    def _run(self) -> None:
        self._round(whole=True)
        while not self._stop.is_set():
            self._round()

    def _round(self, *, whole: bool = False) -> None:
        """Send each request once; unless the round must be complete, end when the thread is stopped."""
        for name, attempt in attempts(self._server, self._image).items():
            try:
                answer = attempt()
            except (OSError, ValueError, http.client.HTTPException) as error:
                answer = CUT if isinstance(error, (ConnectionError, http.client.HTTPException)) else "silent"
            self.answers[name][answer] += 1
            if self._stop.wait(PAUSE_S) and not whole:
                return

    @property
    def unrefused(self) -> dict[str, Counter[str]]:
        """Return the requests that were neither refused with a 4xx status nor cut off, with their answers."""
        return {
            name: bad
            for name, answers in self.answers.items()
            if (bad := Counter({a: n for a, n in answers.items() if not (a.startswith("4") or a == CUT)}))
        }


def attempts(server: Server, image: bytes) -> dict[str, Callable[[], str]]:
    """Return, for every kind of hostile request, a function that sends it and returns the answer's status."""

    def post(path: str, body: bytes, **headers: str) -> str:
        return _post(server, path, body, headers)

    def raw(data: bytes, *, end: bool = False) -> str:
        return _raw(server, data, end=end)

    def get(path: bytes, method: bytes = b"GET") -> str:
        return raw(method + b" " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")

    head = b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\n"
    short = head + b"Content-Length: 100000\r\n\r\n" + image[:50]
    return {
        "no image": lambda: post("/v1/upscale", b""),
        "text": lambda: post("/v1/upscale", b"x" * 1000),
        "a truncated image": lambda: post("/v1/upscale", image[: len(image) // 2]),
        "a PNG that declares 10 gigapixels": lambda: post("/v1/upscale", png_bomb()),
        "a GIF of 4 gigapixels": lambda: post("/v1/jobs", gif_bomb()),
        "an upload beyond the limit": lambda: post("/v1/upscale", bytes(70_000_000)),
        "a length of 1 TB": lambda: raw(head + b"Content-Length: 1000000000000\r\n\r\n"),
        "a negative length": lambda: raw(head + b"Content-Length: -1\r\n\r\n"),
        "a body that ends early": lambda: raw(short, end=True),
        "a damaged chunk": lambda: raw(head + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"),
        "huge headers": lambda: raw(head + b"X: " + b"a" * 100_000 + b"\r\n\r\n"),
        "no HTTP": lambda: raw(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"),
        "headers that never end": lambda: raw(head + b"X: a"),
        "a slow upload": lambda: raw(head + b"Content-Length: 1000000\r\n\r\n"),
        "a damaged form": lambda: post("/v1/upscale", b"--", **{"Content-Type": "multipart/form-data"}),
        "an engine that is a path": lambda: post("/v1/upscale?engine=../../etc/passwd", image),
        "an unknown option": lambda: post("/v1/upscale?steps%00=1", image),
        "an option of another type": lambda: post("/v1/upscale?steps=1e9", image),
        "a job that is a path": lambda: raw(
            b"GET /v1/jobs/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: x\r\n\r\n"
        ),
        "a file outside the page": lambda: get(b"/static/../../store.py"),
        "a method that does not exist": lambda: get(b"/v1/upscale", b"BREW"),
        f"{IDLE} silent connections": lambda: _idle(server),
    }


def png_bomb() -> bytes:
    """Return a small PNG that declares 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">II", 100_000, 100_000) + b"\x08\x02\x00\x00\x00"
    data = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif_bomb() -> bytes:
    """Return an animated GIF whose header declares 65,535 x 65,535 pixels."""
    out = io.BytesIO()
    frames = [Image.new("P", (8, 8), k) for k in range(50)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    data = bytearray(out.getvalue())
    data[6:10] = b"\xff\xff\xff\xff"
    return bytes(data)


def _post(server: Server, path: str, body: bytes, headers: dict[str, str]) -> str:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=120)
    try:
        with suppress(ConnectionError):  # the answer may come before the whole body is sent
            connection.request("POST", path, body, headers)
        return str(connection.getresponse().status)
    finally:
        connection.close()


def _raw(server: Server, data: bytes, *, end: bool = False) -> str:
    """Send bytes, and nothing after them if `end`; return the status of the answer."""
    with socket.create_connection((server.host, server.port), timeout=120) as connection:
        with suppress(ConnectionError):
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
        words = connection.recv(100).split()
        return words[1].decode() if len(words) > 1 else CUT


def _idle(server: Server) -> str:
    """Open connections that send nothing; "cut off" if the server closes all of them in a minute."""
    connections: list[socket.socket] = []
    try:
        with suppress(OSError):  # the service or this process has reached its limit of connections
            for _ in range(IDLE):
                connections.append(socket.create_connection((server.host, server.port), timeout=10))
        end = time.monotonic() + 60
        for connection in connections:
            connection.settimeout(max(end - time.monotonic(), 0.01))
            with suppress(ConnectionError):
                if connection.recv(1):
                    return "answered"
        return CUT
    finally:
        for connection in connections:
            connection.close()
