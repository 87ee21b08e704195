"""Limits of the service, and the reading of request bodies and image headers within them."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from moesr.runtime.images import formats
from moesr.runtime.images.reading import MAX_INPUT_PX
from moesr.runtime.serve.problems import Problem
from moesr.runtime.system import memory

MEGA = 1_000_000
KINDS = "PNG, JPEG, WebP, TIFF, GIF, BMP, JPEG 2000 and AVIF"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one request and of all requests together.

    A request beyond a limit is refused before it costs more than that limit.
    """

    upload_bytes: int = 64 * MEGA  # size of a request's body, counted while it arrives
    input_px: int = 16 * MEGA  # number of pixels of an image, as its header declares them
    queue: int = 32  # number of images that wait or run, over all engines; further ones get 503
    request_s: float = 600.0  # an image of /v1/upscale that takes longer is canceled
    idle_s: float = 10.0  # a connection or an upload that sends nothing for this time is closed
    least_bytes_per_s: float = 4096.0  # least average rate of an upload, after the first `idle_s` seconds
    connections: int = 1024  # number of connections open at the same time
    keep_s: float = 3600.0  # results and errors of jobs are removed after this time
    grace_s: float = 30.0  # time for finishing running images after SIGTERM


async def counted(chunks: AsyncIterator[bytes], limits: Limits) -> AsyncIterator[bytes]:
    """Pass a request's body through and count it; Problem 413 beyond the limit, 408 if it is too slow."""
    total, begin = 0, time.monotonic()
    source = aiter(chunks)
    while True:
        try:
            chunk = await asyncio.wait_for(anext(source), limits.idle_s)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Problem(408, f"the upload sent nothing for {limits.idle_s:.0f} seconds") from None
        total += len(chunk)
        if total > limits.upload_bytes:
            raise Problem(
                413, f"the request is larger than {memory.readable(limits.upload_bytes)}; send less"
            )
        late = time.monotonic() - begin - limits.idle_s
        if late > 0 and total < late * limits.least_bytes_per_s:
            raise Problem(408, f"the upload is slower than {limits.least_bytes_per_s:.0f} bytes per second")
        yield chunk


def check_header(path: Path, limits: Limits) -> tuple[int, int]:
    """Return the width and height that an image file declares, in pixels; no pixel is decoded.

    Problem 415 is raised if the file is not an image that moesr reads, 413 if it declares too many pixels.
    """
    with path.open("rb") as stream:
        head = stream.read(32)
        if not head:
            raise Problem(400, "the request holds no image; send the bytes of an image file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stream.seek(0)
                with Image.open(stream, formats=formats.readable(head)) as image:
                    width, height = image.size
        except Image.DecompressionBombError:
            raise Problem(413, _too_many(limits)) from None
        except UnidentifiedImageError:
            raise Problem(415, f"the file is not an image of a known kind; send one of {KINDS}") from None
        except Exception:  # decoders raise errors of any kind
            raise Problem(422, "the image's header is damaged; send the file again") from None
    if width * height > min(limits.input_px, MAX_INPUT_PX):
        raise Problem(413, f"the image has {width}x{height} pixels; {_too_many(limits)}")
    return width, height


def _too_many(limits: Limits) -> str:
    return f"this service accepts images of up to {limits.input_px / MEGA:g} megapixels"
