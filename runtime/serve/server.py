"""The server process: uvicorn with limits on connections and headers, structured logs, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from moesr.runtime.errors import OutputError
from moesr.runtime.serve.guard import HEADER_BYTES
from moesr.runtime.serve.service import Service
from moesr.runtime.system.console import printable

KEEP_ALIVE_S = 5

log = logging.getLogger("moesr")


class GuardedProtocol(H11Protocol):
    """A connection that is closed if it sends no request in time, or if there are too many connections."""

    idle_s = 10.0
    most = 1024

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or close it at once."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self.loop.call_later(self.idle_s, self._close_if_silent)

    def _close_if_silent(self) -> None:
        """Close the connection if it has not sent all headers of a request yet."""
        if self.cycle is None and self.transport and not self.transport.is_closing():
            self.transport.close()


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
        self._service.closing = True
        super().handle_exit(sig, frame)


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
    protocol = type("Protocol", (GuardedProtocol,), {"idle_s": limits.idle_s, "most": limits.connections})
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
        timeout_graceful_shutdown=max(int(limits.grace_s), 1),
    )
    return Server(config, service)
