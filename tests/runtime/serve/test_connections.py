"""Connections that only cost: each is refused with a problem or cut off, and the service goes on."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress

import pytest
from pictures import picture

HEAD = b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"

REFUSED = {
    "huge header": (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
    "many headers": (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 20_000 + b"\r\n", 431),
    "huge address": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
    "no HTTP": (b"\x16\x03\x01 no http\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "line feed in a header": (b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", 400),
    "negative length": (HEAD + b"Content-Length: -1\r\n\r\n", 400),
    "two lengths": (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "damaged chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    "one terabyte": (HEAD + b"Content-Length: 1000000000000\r\n\r\n", 413),
    "digits as length": (HEAD + b"Content-Length: " + b"9" * 19 + b"\r\n\r\n", 413),
    "larger than allowed": (HEAD + b"Content-Length: 300000\r\nExpect: 100-continue\r\n\r\n", 413),
    "no body": (HEAD + b"\r\n", 400),
    "no such method": (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "websocket": (
        b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        404,
    ),
    "proxy": (b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "another host": (b"GET http://example.org/ HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "whole server": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "way out of the page": (b"GET /static/../../store.py HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "encoded way out": (b"GET /static/%2e%2e/%2e%2e/store.py HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "job with a zero byte": (b"GET /v1/jobs/%00 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
}


def received(connection: socket.socket, limit_s: float = 30.0) -> bytes:
    """All bytes until the other side closes."""
    connection.settimeout(limit_s)
    data = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            data += part
    return data


@pytest.mark.parametrize(("sent", "status"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_problems_and_come_at_once(strict_process, sent, status):
    begin = time.monotonic()
    with socket.create_connection(strict_process.address) as connection:
        connection.sendall(sent)
        connection.settimeout(30)
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
        while not body:
            body = connection.recv(65536)
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"application/problem+json" in head
    assert json.loads(body)["status"] == status
    assert time.monotonic() - begin < 20
    assert strict_process.client.get("/healthz").status_code == 200


SILENT = {
    "nothing": b"",
    "half a request": b"GET / HTTP/1.1\r\nHost: x\r\nX: a",
    "a request and half of another": GET + b"GET / HTTP/1.1\r\nHost: x\r\nX: a",
    "a refused upload that goes on": HEAD + b"Content-Length: 1000000\r\n\r\n" + bytes(1000),
}


@pytest.mark.parametrize("sent", SILENT.values(), ids=SILENT)
def test_silent_connections_are_closed(strict_process, sent):
    with socket.create_connection(strict_process.address) as connection:
        connection.sendall(sent)
        received(connection)  # until the server closes


def test_an_answer_that_nobody_reads_is_cut_off(strict_process):
    request = b"GET /v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    size = len(strict_process.client.get("/v1/openapi.json").content)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(strict_process.address)
        connection.settimeout(2)
        with suppress(ConnectionError, TimeoutError):
            connection.sendall(request * 600)
        time.sleep(2.0)
        assert len(received(connection)) < 600 * size


def test_a_body_that_ends_early_leaves_nothing(strict_process):
    incoming = strict_process.log.parent / "state" / "incoming"
    for form in (b"", b"Content-Type: multipart/form-data; boundary=x\r\n"):
        with socket.create_connection(strict_process.address) as connection:
            connection.sendall(HEAD + form + b"Content-Length: 10000\r\n\r\n--x\r\n" + picture()[:50])
            connection.shutdown(socket.SHUT_WR)
            received(connection)
    limit = time.monotonic() + 30
    while list(incoming.iterdir()):
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_slow_body_is_a_timeout(strict_process):
    with socket.create_connection(strict_process.address) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        with suppress(ConnectionError):
            for _ in range(20):  # never silent for long, but far too slow
                connection.sendall(b"x")
                time.sleep(0.1)
        assert received(connection).startswith(b"HTTP/1.1 408 ")


def test_pipelined_requests_are_answered_in_order(strict_process):
    with socket.create_connection(strict_process.address) as connection:
        connection.sendall(GET * 5)
        assert received(connection).count(b"HTTP/1.1 200 ") == 5


def test_connections_beyond_the_limit_are_closed_at_once(strict_process):
    held = [socket.create_connection(strict_process.address) for _ in range(80)]
    time.sleep(0.2)
    closed = 0
    for connection in held:
        connection.setblocking(False)
        try:
            closed += connection.recv(1) == b""
        except BlockingIOError:
            pass
        except ConnectionError:
            closed += 1
        connection.close()
    assert closed >= 30
    assert strict_process.client.get("/healthz").status_code == 200
