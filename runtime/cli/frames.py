"""Animations and files of several pages: all frames are read, and all results go into one file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moesr.runtime.errors import InputError, MemoryLimitError, MoesrError, OutputError
from moesr.runtime.images import encoding, metadata, reading, writing
from moesr.runtime.images.png_chunks import Inserting, packed
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.reading import LoadedImage
from moesr.runtime.system import memory
from moesr.runtime.system.files import reason, write_atomically

FORMATS = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
"""Formats that can hold several frames, by extension: APNG, animated WebP, and pages of TIFF."""

PIXEL_BYTES = 8
"""Memory per pixel of a result: up to four channels, as an array and as an image for the encoder."""

DEFAULT_MS = 100
"""The duration of a frame if its file does not give one."""


@dataclass
class Frames:
    """The frames of one file: how long each is shown, and the results so far."""

    count: int
    durations_ms: list[int] = field(default_factory=list)  # empty for pages of a TIFF
    loop: int = 0  # repetitions of an animation, 0 for endless
    results: list[LoadedImage] = field(default_factory=list)
    failed: bool = False


def count(stream: BufferedReader) -> int:
    """Return the number of frames or pages of an image file; 1 if it cannot be read as such."""
    try:
        stream.seek(0)
        with warnings.catch_warnings(action="ignore"), Image.open(stream, formats=_formats()) as image:
            several = getattr(image, "is_animated", False) and image.format != "MPO"
            return int(getattr(image, "n_frames", 1)) if several else 1
    except Exception:  # decoders raise errors of any kind; `reading.load` will explain this one
        return 1
    finally:
        stream.seek(0)


def check(target: Path, number: int) -> None:
    """Raise OutputError if a file of this name cannot hold several frames."""
    if number > 1 and target.suffix.lower() not in FORMATS:
        raise OutputError(
            f"{target}: {target.suffix} cannot hold {number} frames; use --format with one of "
            f"{', '.join(sorted({extension[1:] for extension in FORMATS}))}, or leave out --frames all"
        )


def check_memory(source: Path, number: int, size: tuple[int, int]) -> None:
    """Raise MemoryLimitError if the results of all frames of `size` (height, width) exceed the memory."""
    needed, free = number * size[0] * size[1] * PIXEL_BYTES, memory.available_bytes()
    if number > 1 and free is not None and needed > free:
        raise MemoryLimitError(
            f"{source}: {number} frames of {size[1]}x{size[0]} pixels need {memory.readable(needed)} of "
            f"memory, {memory.readable(free)} are free; ask for a smaller --size, or cut the file into parts"
        )


def read(stream: BufferedReader, path: Path, sequence: Frames) -> Iterator[LoadedImage]:
    """Yield the frames of a file in order, each complete; their durations go into `sequence`.

    InputError is raised if a frame is damaged or cannot be used.
    """
    if sequence.count == 1:
        yield reading.load(path, stream)
        return
    stream.seek(0)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(stream, formats=_formats()) as image:
            if image.width * image.height > reading.MAX_INPUT_PX:
                reading.from_pil(image, name=str(path))  # raises the InputError about its size
            sequence.loop = int(image.info.get("loop", 0))
            for number in range(sequence.count):
                image.seek(number)
                image.load()
                if image.format != "TIFF":
                    sequence.durations_ms.append(round(image.info.get("duration") or DEFAULT_MS))
                frame = image.copy()
                if image.format == "PNG":  # the reader of metadata searches for its chunks
                    frame.format = image.format
                yield reading.from_pil(frame, name=f"{path} (frame {number + 1})")
    except (MoesrError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of any kind
        raise InputError(f"{path}: a frame is truncated or damaged ({error}); get the file again") from error


def save(path: Path, sequence: Frames, record: Provenance, quality: int | None = None) -> None:
    """Write the results of all frames as one file, complete or not at all, with the metadata of the first.

    Raises OutputError if the file cannot be written.
    """
    pictures, name = _pictures(sequence.results), FORMATS[path.suffix.lower()]
    grey = pictures[0].mode in ("L", "LA", "I;16")
    carried = metadata.fitted(sequence.results[0].metadata, name, str(path), grey=grey)
    options, _ = encoding.options(carried, name, record)
    options |= {"save_all": True, "append_images": pictures[1:]}
    if name == "TIFF":
        options["compression"] = "tiff_adobe_deflate"
    elif sequence.durations_ms:
        options |= {"duration": sequence.durations_ms, "loop": sequence.loop}
    if name == "WEBP":
        options["quality"] = quality or 95
    try:
        content = io.BytesIO()  # the encoder of pages reads back its own output
        target: Any = content
        if name == "PNG" and carried.color:
            target = Inserting(content, b"".join(packed(*chunk) for chunk in carried.color))
        pictures[0].save(target, name, **options)
        with write_atomically(path) as stream:
            stream.write(content.getbuffer())
    except MemoryError:
        raise
    except Exception as error:  # encoders raise errors of any kind
        raise OutputError(
            f"{path}: cannot be written: {reason(error)}; name another place with -o"
        ) from error


def _pictures(results: Sequence[LoadedImage]) -> list[Image.Image]:
    """Return the results as images of one mode, since an animation cannot mix modes."""
    pictures = [writing.to_pil(np.ascontiguousarray(result.pixels)) for result in results]
    modes = {picture.mode for picture in pictures}
    if len(modes) == 1:
        return pictures
    alpha = any(mode.endswith("A") for mode in modes)
    return [picture.convert("RGBA" if alpha else "RGB") for picture in pictures]


def _formats() -> list[str]:
    Image.init()
    return [name for name in reading.READ_FORMATS if name in Image.OPEN]
