"""Errors of the service, as JSON problem details (RFC 9457) that reveal no file names and no internals."""

from __future__ import annotations

import re
from concurrent.futures import CancelledError
from http import HTTPStatus
from typing import Any

from moesr.runtime.errors import InputError, MemoryLimitError, MoesrError, OutputError, UsageError

MEDIA_TYPE = "application/problem+json"

_PATHS = re.compile(r"(?<![\w/])/(?:[^\s:;,'\"()]+/)*[^\s:;,'\"()]*")


class Problem(Exception):
    """A response with an error status.

    `detail` is for the client's user; `headers` are added to the response.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}

    def body(self) -> dict[str, Any]:
        """Return the problem as the values of its JSON object."""
        title = HTTPStatus(self.status).phrase
        return {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail}


def of_error(error: BaseException) -> Problem:
    """Return the problem with which a client is told about an error of the runtime."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, CancelledError):
        return Problem(409, "the image was cancelled")
    if isinstance(error, (MemoryLimitError, MemoryError)):
        return Problem(413, "the image needs more memory than this machine has free; send a smaller image")
    if isinstance(error, (OSError, OutputError)):
        return Problem(507, "the server cannot store the image or its result; the server's log says why")
    if isinstance(error, UsageError):
        return Problem(400, without_paths(str(error)))
    if isinstance(error, InputError):
        return Problem(422, without_paths(str(error)))
    if isinstance(error, MoesrError):
        return Problem(500, "the engine failed on this image; the reason is in the server's log")
    return Problem(500, "internal error; the reason is in the server's log")


def without_paths(text: str) -> str:
    """Return a message without the server's file names: "the image: is damaged" for "/tmp/x: is damaged"."""
    return _PATHS.sub("the image", text)
