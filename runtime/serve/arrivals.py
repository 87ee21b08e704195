"""Counts the bytes of requests while they arrive, per request and in total, and refuses slow uploads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from moesr.runtime.serve.limits import Limits
from moesr.runtime.serve.problems import Problem
from moesr.runtime.system import memory

_LOOK_S = 0.25  # seconds between two checks of whether the service is closing


class Arrivals:
    """All requests that are arriving. Only the event loop's thread uses it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.bytes = 0  # sum over all requests
        self.closing = False  # set once no further image is accepted

    @contextmanager
    def request(self, declared: str | None) -> Iterator[Arrival]:
        """Count one request for as long as its bytes are stored without a place in the queue.

        `declared` is its header Content-Length. It is only used to refuse the request early, with Problem 413
        if it is larger than allowed.
        """
        arrival = Arrival(self, self._limits)
        if declared and declared.isdecimal() and int(declared[:20]) > self._limits.upload_bytes:
            raise arrival.too_large()
        try:
            yield arrival
        finally:
            self.bytes -= arrival.bytes


class Arrival:
    """A request that is arriving."""

    def __init__(self, arrivals: Arrivals, limits: Limits) -> None:
        self._all, self._limits = arrivals, limits
        self._begin = time.monotonic()
        self.bytes = 0

    async def counted(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the chunks of the body and count them.

        Problem 413 is raised if the body is too large, 408 if it arrives too slowly, and 503 if all requests
        together are too large or the service is closing.
        """
        source = aiter(chunks)
        while (chunk := await self._next(source)) is not None:
            self._count(len(chunk))
            yield chunk

    async def _next(self, source: AsyncIterator[bytes]) -> bytes | None:
        """Return the next chunk, or None after the last one."""
        limits, coming = self._limits, asyncio.ensure_future(anext(source, None))
        end = time.monotonic() + limits.idle_s
        try:
            while not (await asyncio.wait((coming,), timeout=min(_LOOK_S, limits.idle_s)))[0]:
                if self._all.closing:
                    raise closing()
                if time.monotonic() >= end:
                    raise Problem(408, f"the upload sent nothing for {limits.idle_s:g} seconds")
            return coming.result()
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)

    def _count(self, size: int) -> None:
        limits = self._limits
        self.bytes += size
        self._all.bytes += size
        if self._all.closing:
            raise closing()
        if self.bytes > limits.upload_bytes:
            raise self.too_large()
        if self._all.bytes > limits.uploads_bytes:
            raise Problem(
                503, "too many uploads at the same time; try again in a moment", {"Retry-After": "5"}
            )
        late = time.monotonic() - self._begin - limits.idle_s
        if late > 0 and self.bytes < late * limits.least_bytes_per_s:
            raise Problem(408, f"the upload is slower than {limits.least_bytes_per_s:.0f} bytes per second")

    def too_large(self) -> Problem:
        """Return the problem of a request that is larger than allowed."""
        return Problem(
            413, f"the request is larger than {memory.readable(self._limits.upload_bytes)}; send less"
        )


def closing() -> Problem:
    """Return the problem of a request that arrives while the service is shutting down."""
    return Problem(503, "the service is shutting down; try again later", {"Retry-After": "30"})
