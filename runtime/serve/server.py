"""The server process: uvicorn with limits on connections and headers, structured logs, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from moesr.runtime.errors import OutputError
from moesr.runtime.serve.guard import HEADER_BYTES, HEADERS
from moesr.runtime.serve.problems import MEDIA_TYPE, Problem
from moesr.runtime.serve.service import Service
from moesr.runtime.system.console import printable

KEEP_ALIVE_S = 5
LINGER_S = 1.0  # seconds between a refusal and the end of the connection

STALLED = 3
"""A client that does not read its answer is disconnected after this multiple of `idle_s`."""

OTHER_FILES = 256
"""Number of files that the process may need besides those of connections and uploads."""

log = logging.getLogger("moesr")


class GuardedProtocol(H11Protocol):
    """A connection that is closed if it sends no request in time, or does not read its answer in time.

    Bytes that are not a valid request are answered with problem details as well.
    """

    service: Service

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or close it at once if there are too many."""
        self._limits = self.service.limits
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._refused = False
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            transport.abort()
            return
        self._limit_silence()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers of the connection."""
        for timer in self._timers.values():
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process bytes of a request; bytes that follow a refusal are dropped."""
        if not self._refused:
            super().data_received(data)
            self._limit_silence()

    def on_response_complete(self) -> None:
        """Start the timer for the next request."""
        super().on_response_complete()
        self._limit_silence()

    @property
    def _between(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _limit_silence(self) -> None:
        """Start the timer for the headers of the next request, unless it runs."""
        if self._between and "silence" not in self._timers:
            timer = self.loop.call_later(self._limits.idle_s, self._close_if_silent, self.cycle)
            self._timers["silence"] = timer

    def _close_if_silent(self, last: object) -> None:
        """Close the connection if `last` is still its most recent request."""
        del self._timers["silence"]
        if not (self._between and self.cycle is last):
            self._limit_silence()
        elif self.transport.get_write_buffer_size():  # the client does not read: closing would wait for ever
            self.transport.abort()
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Start the timer after which a client that does not read its answer is disconnected."""
        super().pause_writing()
        timer = self.loop.call_later(STALLED * self._limits.idle_s, self.transport.abort)
        self._timers["stalled"] = timer

    def resume_writing(self) -> None:
        """Stop the timer, because the client has read most of its answer."""
        super().resume_writing()
        if timer := self._timers.pop("stalled", None):
            timer.cancel()

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: a request for another protocol is answered like any other one."""

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not a valid request. uvicorn calls this in its exception handler."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        text = (
            f"address and headers are larger than {HEADER_BYTES} bytes"
            if status == 431
            else "this is not a valid HTTP request"
        )
        problem = Problem(status, text)
        self._refused = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem.body()).encode()
            headers = {**HEADERS, "Content-Type": MEDIA_TYPE, "Content-Length": str(len(body))}
            lines = [*headers.items(), ("Connection", "close")]
            answer = h11.Response(status_code=status, headers=lines, reason=HTTPStatus(status).phrase)
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if not self._between:  # its body is damaged: the request that waits for it ends
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        client = (self.client or ("",))[0]
        self.service.metrics.requests.labels("other", "other", str(status)).inc()
        values = {"client": client, "status": status}
        log.info("%(client)s sent an invalid request, %(status)s", values, extra={"fields": values})
        self.loop.call_later(LINGER_S, self.transport.close)  # an immediate close could discard the answer


class Server(uvicorn.Server):
    """A server that stops accepting images as soon as a signal arrives."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs. A requested stop is not a failure of the process."""
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and log the address."""
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Record the signal."""
        self._service.close()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Leave waiting jobs on disk, then wait for the requests in work."""
        self._service.close()
        self._service.keep_waiting()
        await super().shutdown(sockets)


class JsonLines(logging.Formatter):
    """Log records as one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        values: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values)


class TextLines(logging.Formatter):
    """Log records as text, with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        text = printable(f"{record.levelname.lower()}: {record.getMessage()}")
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; OutputError if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from error


def server_of(app: FastAPI, service: Service) -> Server:
    """Return the server of an application, which `run(sockets=[listen(..)])` runs."""
    limits = service.limits
    _allow_open_files(3 * limits.connections + OTHER_FILES)
    protocol = type("Protocol", (GuardedProtocol,), {"service": service})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(limits.grace_s) + 2,  # answers end with a problem before that
    )
    return Server(config, service)


def _allow_open_files(wanted: int) -> None:
    """Raise the limit of open files to `wanted`; log a warning if the system does not allow that."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("only %d files may be open, fewer than --connections needs; raise ulimit -n", most)
