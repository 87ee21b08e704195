"""The image and the options of a request: a raw body, or a multipart form with one file."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from moesr.runtime.loop.settings import OPTION_NAMES
from moesr.runtime.serve.arrivals import Arrival
from moesr.runtime.serve.problems import Problem

FIELDS = 32  # most fields of a form
FIELD_BYTES = 4096  # size of a field that is not a file
BLOCK_BYTES = 1 << 18  # size of the blocks in which a body is written
_KINDS = {
    **dict.fromkeys(("steps", "seed", "reuse", "start_step", "quality"), int),
    **dict.fromkeys(("fidelity", "guidance"), float),
}
IMAGE_OPTIONS = tuple(name for name in OPTION_NAMES if name != "checkpoint_every")
"""Options of a request. Saved latents of clients' images would stay on the disk if they are canceled."""

_FLAGS = ("tileable", "keep_colors_under_alpha")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_OTHERS = ("engine", "format", "quality", "priority")
_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_REAL = re.compile(r"[+-]?([0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})([eE][+-]?[0-9]{1,3})?")


async def receive(request: Request, path: Path, arrival: Arrival) -> dict[str, str]:
    """Write the image of a request to `path` while it arrives; return the options that came with it.

    Options are query parameters, or fields of a multipart form. A Problem is raised if the request is wrong.
    """
    options = dict(request.query_params)
    chunks = arrival.counted(request.stream())
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            options |= await _form(request, chunks, path)
        else:
            await _write(chunks, path)
    except ClientDisconnect:
        raise Problem(400, "the connection ended before the whole image had arrived") from None
    return options


async def _write(chunks: AsyncIterator[bytes], path: Path) -> None:
    """Write a body to a file in blocks; the event loop never waits for the disk."""
    with path.open("wb") as file:
        block = bytearray()
        async for chunk in chunks:
            block += chunk
            if len(block) >= BLOCK_BYTES:
                await asyncio.to_thread(file.write, block)
                block = bytearray()
        await asyncio.to_thread(file.write, block)


async def _form(request: Request, chunks: Any, path: Path) -> dict[str, str]:
    """Read a multipart form; its only file is written to `path`."""
    parser = MultiPartParser(
        request.headers, chunks, max_files=1, max_fields=FIELDS, max_part_size=FIELD_BYTES
    )
    parser.spool_max_size = BLOCK_BYTES
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, AssertionError) as error:
        if isinstance(error.__cause__, Problem):
            raise error.__cause__ from None
        raise Problem(
            400, f"the multipart form is damaged; send one file and at most {FIELDS} short fields"
        ) from None
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if len(files) != 1:
            raise Problem(400, "the form holds no file; send the image as a file in the field image")
        await asyncio.to_thread(_copy, files[0], path)
        return {name: value for name, value in form.multi_items() if isinstance(value, str)}
    finally:
        await form.close()


def _copy(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as file:
        while block := upload.file.read(1 << 20):
            file.write(block)


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a request that are options of `Upscaler.submit`."""
    return {name: options[name] for name in IMAGE_OPTIONS if name in options}


def check_options(given: Mapping[str, str], engines: Mapping[str, object]) -> dict[str, Any]:
    """Return the options of a request as values: those of the command line, with engine, format and priority.

    Problem 400 is raised for an option that is unknown or has an invalid value, and 404 for an engine that is
    not served.
    """
    values: dict[str, Any] = {}
    for name, text in given.items():
        key = name.replace("-", "_")
        if key not in IMAGE_OPTIONS and key not in _OTHERS:
            known = ", ".join((*IMAGE_OPTIONS, *_OTHERS))
            raise Problem(400, f"unknown option {name[:40]!r}; the options are {known}")
        if text.strip() == "":
            continue
        if key in _FLAGS:
            values[key] = _flag(key, text)
        else:
            values[key] = _number(key, text, _KINDS[key]) if key in _KINDS else text[:200]
    values.setdefault("engine", next(iter(engines)))
    if values["engine"] not in engines:
        raise Problem(404, f"there is no engine {values['engine'][:40]!r} here; GET /v1/engines lists them")
    if not 1 <= values.get("quality", 1) <= 100:
        raise Problem(400, "quality is expected to be a whole number from 1 to 100")
    return values


def _flag(name: str, text: str) -> bool:
    if text.lower() not in _TRUTH:
        raise Problem(400, f"{name} is {text[:40]!r}, expected true or false")
    return _TRUTH[text.lower()]


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    if not (_WHOLE if kind is int else _REAL).fullmatch(text.strip()):
        what = "a whole number" if kind is int else "a number"
        raise Problem(400, f"{name} is {text[:40]!r}, expected {what}")
    return kind(text)
