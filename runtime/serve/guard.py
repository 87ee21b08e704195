"""The outermost layer: bearer tokens, security headers, metrics of requests and one log line per request."""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesr.runtime.serve.problems import MEDIA_TYPE, Problem
from moesr.runtime.serve.service import Service

OPEN = ("/healthz", "/readyz", "/", "/static/", "/favicon.ico")
"""Paths that need no token, because the page itself contains no secrets."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

HEAD = "moesr.head"
"""Key in the scope of a HEAD request, which is served as GET without the body."""

RANGES = (b"range", b"if-range")
"""Request headers that are ignored: results are always sent whole."""

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")
"""Methods that are labels of metrics. Clients could send any number of other ones."""

HEADER_BYTES = 16_384
"""The largest size of a request's address and headers together."""

log = logging.getLogger("moesr.requests")


class Guard:
    """Middleware that wraps the whole application."""

    def __init__(self, app: ASGIApp, service: Service, token: str | None) -> None:
        self._app, self._service = app, service
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, identifier = time.monotonic(), secrets.token_hex(8)
        seen: dict[str, Any] = {"status": 0, "bytes": 0}
        inner = {**scope, "headers": [one for one in scope["headers"] if one[0] not in RANGES]}
        if scope["method"] == "HEAD":
            inner |= {"method": "GET", HEAD: True}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = identifier
                if "accept-ranges" in headers:
                    headers["Accept-Ranges"] = "none"
            elif message["type"] == "http.response.body":
                seen["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            problem = self._refusal(scope)
            if problem is None:
                await self._app(inner, receive, answer)
            else:
                refusal = JSONResponse(problem.body(), problem.status, problem.headers, MEDIA_TYPE)
                await refusal(scope, receive, answer)
        finally:
            self._note(inner, scope["method"], seen, time.monotonic() - begin, identifier)

    def _refusal(self, scope: Scope) -> Problem | None:
        """Return the problem for which a request is refused; None if it is allowed."""
        sizes = (len(name) + len(value) for name, value in scope["headers"])
        if len(scope["raw_path"]) + len(scope["query_string"]) + sum(sizes) > HEADER_BYTES:
            return Problem(431, f"address and headers are larger than {HEADER_BYTES} bytes")
        if not self._admits(scope):
            return Problem(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        site = Headers(scope=scope).get("sec-fetch-site", "none")
        if scope["method"] not in ("GET", "HEAD") and site not in ("none", "same-origin"):
            return Problem(403, "a page of another site may not use this service")
        return None

    def _admits(self, scope: Scope) -> bool:
        """Return True if a request needs no token or carries the right one, compared in constant time."""
        path = scope["path"]
        if self._token is None or path in OPEN or path.startswith("/static/"):
            return True
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._token)  # the bytes that were sent
        return right and kind.lower() == "bearer"

    def _note(self, scope: Scope, method: str, seen: dict[str, Any], seconds: float, identifier: str) -> None:
        """Count the request and write its line to the log."""
        route = getattr(scope.get("route"), "path", "other")
        metrics, known = self._service.metrics, method if method in METHODS else "other"
        metrics.requests.labels(known, route, str(seen["status"])).inc()
        if seen["status"] == 503 and scope["method"] == "POST":
            metrics.rejected.inc()
        client = scope.get("client") or ("", 0)
        values = {
            "request": identifier,
            "client": client[0],
            "method": method[:40],
            "path": scope["path"][:200],
            "status": seen["status"],
            "bytes": seen["bytes"],
            "seconds": round(seconds, 3),
        }
        text = "%(client)s %(method)s %(path)s %(status)s, %(bytes)d bytes, %(seconds).3f s"
        log.info(text, values, extra={"fields": values})
