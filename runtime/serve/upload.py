"""The image and the options of a request: a raw body, or a multipart form with one file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from moesr.runtime.loop.settings import OPTION_NAMES
from moesr.runtime.serve.limits import Limits, counted
from moesr.runtime.serve.problems import Problem

FORMATS = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "tiff": "image/tiff",
}
"""Formats of results, by the name in `format`, with their media types."""

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif"}
FIELDS = 32  # most fields of a form
_NUMBERS = {"steps": int, "seed": int, "reuse": int, "fidelity": float, "guidance": float}
_OTHERS = ("engine", "format", "quality", "priority")


async def receive(request: Request, path: Path, limits: Limits) -> dict[str, str]:
    """Write the image of a request to `path` while it arrives; return the options that came with it.

    Options are query parameters, or fields of a multipart form. A Problem is raised if the request is wrong.
    """
    options = dict(request.query_params)
    chunks = counted(request.stream(), limits)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            options |= await _form(request, chunks, path)
        else:
            with path.open("wb") as file:
                async for chunk in chunks:
                    file.write(chunk)
    except ClientDisconnect:
        raise Problem(400, "the connection ended before the whole image had arrived") from None
    except OSError as error:
        raise Problem(507, f"the image cannot be stored ({os.strerror(error.errno or 0)})") from error
    return options


async def _form(request: Request, chunks: Any, path: Path) -> dict[str, str]:
    """Read a multipart form; its only file is written to `path`."""
    parser = MultiPartParser(request.headers, chunks, max_files=1, max_fields=FIELDS)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, AssertionError) as error:
        if isinstance(error.__cause__, Problem):
            raise error.__cause__ from None
        raise Problem(400, "the multipart form is damaged; send one file and at most 32 fields") from None
    try:
        files = [value for value in form.values() if isinstance(value, UploadFile)]
        if len(files) != 1:
            raise Problem(400, "the form holds no file; send the image as a file in the field image")
        await asyncio.to_thread(_copy, files[0], path)
        return {name: value for name, value in form.items() if isinstance(value, str)}
    finally:
        await form.close()


def _copy(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as file:
        while block := upload.file.read(1 << 20):
            file.write(block)


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a request that are options of `Upscaler.submit`."""
    return {name: options[name] for name in OPTION_NAMES if name in options}


def check_options(given: Mapping[str, str], accept: str, engines: Mapping[str, object]) -> dict[str, Any]:
    """Return the options of a request as values: those of the command line, with engine, format and priority.

    Problem 400 is raised for an option that is unknown or has an invalid value, 404 for an engine that is not
    served, and 406 if no format of results is acceptable.
    """
    values: dict[str, Any] = {}
    for name, text in given.items():
        key = name.replace("-", "_")
        if key not in OPTION_NAMES and key not in _OTHERS:
            known = ", ".join((*OPTION_NAMES, *_OTHERS))
            raise Problem(400, f"unknown option {name[:40]!r}; the options are {known}")
        if text == "":
            continue
        values[key] = _number(key, text, _NUMBERS[key]) if key in _NUMBERS else text[:200]
    values.setdefault("engine", next(iter(engines)))
    if values["engine"] not in engines:
        raise Problem(404, f"there is no engine {values['engine'][:40]!r} here; GET /v1/engines lists them")
    values["format"] = _format(values.get("format"), accept)
    if "quality" in values:
        values["quality"] = _number("quality", values["quality"], int)
        if not 1 <= values["quality"] <= 100:
            raise Problem(400, "quality is expected to be a whole number from 1 to 100")
    return values


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        if len(text) > 40:
            raise ValueError
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise Problem(400, f"{name} is {text[:40]!r}, expected {what}") from None


def _format(asked: str | None, accept: str) -> str:
    """Return the format of the result: the option, or the first of `Accept` that can be written, or PNG."""
    if asked is not None:
        name = {"jpg": "jpeg", "tif": "tiff"}.get(asked.lower(), asked.lower())
        if name not in FORMATS:
            raise Problem(400, f"format is {asked[:40]!r}, expected one of {', '.join(FORMATS)}")
        return name
    wanted = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for media in wanted:
        for name, media_type in FORMATS.items():
            if media == media_type:
                return name
    if not accept or any(media in ("*/*", "image/*", "application/json", "") for media in wanted):
        return "png"
    raise Problem(406, f"the possible formats of a result are {', '.join(FORMATS.values())}")
