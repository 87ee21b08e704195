"""Limits of the service, and the check of an image's header against them."""

from __future__ import annotations

import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from moesr.runtime.images import formats
from moesr.runtime.images.jxl_header import jxl_size
from moesr.runtime.images.reading import MAX_INPUT_PX
from moesr.runtime.serve.problems import Problem

MEGA = 1_000_000
KINDS = "PNG, JPEG, WebP, TIFF, GIF, BMP, JPEG 2000 and AVIF"

JPEG_SCANS = 200
"""Largest number of scans in a JPEG. Each one costs a pass over all pixels; usual files have up to 11."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one request and of all requests together.

    A request beyond a limit is refused before it costs more than that limit.
    """

    upload_bytes: int = 64 * MEGA  # size of a request's body, counted while it arrives
    uploads_bytes: int = 1024 * MEGA  # size of all bodies together that are arriving
    input_px: int = 16 * MEGA  # pixels of an image, as its header declares them
    queue: int = 32  # images that wait or run, over all engines; further images get 503
    request_s: float = 600.0  # an image of /v1/upscale that takes longer is cancelled
    idle_s: float = 10.0  # a connection or an upload that sends nothing for this long is closed
    least_bytes_per_s: float = 4096.0  # average rate of an upload, after the first `idle_s` seconds
    connections: int = 1024  # number of connections open at the same time
    keep_s: float = 3600.0  # results and errors of jobs are removed after this
    grace_s: float = 30.0  # time that SIGTERM leaves for what is at work


def check_header(path: Path, limits: Limits) -> tuple[int, int]:
    """Return the width and height that an image file declares, in pixels; no pixel is decoded.

    Problem 415 is raised if the file is not an image that moesr reads, 413 if it declares too many pixels,
    and 422 if the header is damaged or decoding would take hours.
    """
    with path.open("rb") as stream:
        head = stream.read(32)
        if not head:
            raise Problem(400, "the request holds no image; send the bytes of an image file")
        width, height = _declared(stream, head, limits)
    if width * height > min(limits.input_px, MAX_INPUT_PX):
        raise Problem(413, f"the image has {width}x{height} pixels; {_too_many(limits)}")
    if head.startswith(b"\xff\xd8"):
        with path.open("rb") as stream:
            _check_scans(stream)
    return width, height


def _declared(stream: BinaryIO, head: bytes, limits: Limits) -> tuple[int, int]:
    """Return the width and height that the header of a file declares; Problem as for `check_header`."""
    try:
        known = formats.readable(head)
        if "JXL" in known and (size := jxl_size(stream)):
            return size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream.seek(0)
            with Image.open(stream, formats=known) as image:
                return image.size
    except Image.DecompressionBombError:
        raise Problem(413, _too_many(limits)) from None
    except UnidentifiedImageError:
        raise Problem(415, f"the file is not an image of a known kind; send one of {KINDS}") from None
    except Exception:  # decoders raise whatever their parsers meet
        if head.startswith(formats.PNG_SIGNATURE) and len(head) >= 24:  # its text may be too long for Pillow
            return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        raise Problem(422, "the image's header is damaged; send the file again") from None


def _check_scans(stream: BinaryIO) -> None:
    """Raise Problem 422 if a JPEG has so many scans that decoding it would keep a thread busy for hours."""
    scans, place = 0, 0
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while (place := data.find(b"\xff\xda", place) + 1) > 0:  # in data of pixels 0xFF is followed by 0
            scans += 1
            if scans > JPEG_SCANS:
                raise Problem(422, f"the JPEG has more than {JPEG_SCANS} scans; save it again")


def _too_many(limits: Limits) -> str:
    return f"this service accepts images of up to {limits.input_px / MEGA:g} megapixels"
