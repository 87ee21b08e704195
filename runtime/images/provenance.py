"""The record in every result: the input, the engine and the settings with which it was made.

The record is a line of JSON. It is the text chunk "moesr" of a PNG, a separate comment of a JPEG, and the end
of the Software tag of TIFF and WebP, after its other content. BMP has no place for it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from moesr.runtime.images import libtiff, png_chunks
from moesr.runtime.images.formats import PNG_SIGNATURE
from moesr.runtime.system.files import check_file

KEY = "moesr"
UNKNOWN_VERSION = "unknown"
_MARK = re.compile(r"(?:; )?moesr (\{.*\})[\s\0]*\Z", re.DOTALL)
_SOFTWARE = 0x0131
_TIFF = (b"II*\0", b"MM\0*", b"II+\0")  # the last is BigTIFF
_KINDS = ((b"\xff\xd8\xff", "JPEG"), *((head, "TIFF") for head in _TIFF), (b"RIFF", "WEBP"))
_STRIPS = ((273, 279), (324, 325))  # positions and sizes of strips and of tiles


@functools.cache
def _version() -> str:
    """Return the version of this package; a copy without package metadata has none."""
    try:
        return importlib.metadata.version("moesr") or UNKNOWN_VERSION
    except Exception:  # not installed, or its metadata are damaged
        return UNKNOWN_VERSION


@dataclass(frozen=True)
class Provenance:
    """The record of how a result was made. `digest` is the SHA-256 of the input file, `source` its name.

    `origin` is the repository and commit of an engine from the Hugging Face hub, and "" for another engine.
    """

    scale: int
    engine: str
    settings: Mapping[str, Any]
    source: str = ""
    digest: str = ""
    version: str = field(default_factory=_version)
    origin: str = ""

    def of(self, source: str, digest: str) -> Provenance:
        """Return the same record for a result of this source."""
        return replace(self, source=source, digest=digest)

    def to_json(self) -> str:
        """Return the record as one line of ASCII."""
        values = {KEY: self.version, "source": self.source, "source_sha256": self.digest}
        values |= {"engine_origin": self.origin} if self.origin else {}
        return json.dumps(
            values | {"scale": self.scale, "engine": self.engine, "settings": dict(self.settings)}
        )

    def differences(self, wanted: Provenance) -> str:
        """Return the differences to the wanted record, as in "steps 20 (now 50), ...".

        "" if there are none.
        """
        before = {"engine": self.engine, **self.settings}
        after = {"engine": wanted.engine, **wanted.settings}
        changed = [k for k in before | after if before.get(k) != after.get(k)]
        parts = [f"{k} {before.get(k)} (now {after.get(k)})" for k in changed]
        if self.digest != wanted.digest:
            parts.append(f"another version of {self.source}")
        return ", ".join(parts)


def to_software(earlier: Any, record: Provenance) -> str:
    """Return the text of a Software tag that holds the record after its previous content.

    Cameras pad fixed fields with NUL characters, at which readers would stop.
    """
    text = earlier.decode("latin-1") if isinstance(earlier, bytes) else str(earlier or "")
    kept = without_mark(text)
    return f"{kept}; moesr {record.to_json()}" if kept else f"moesr {record.to_json()}"


def without_mark(text: str) -> str:
    """Return a Software tag as it was before `to_software`, without NUL characters."""
    parts = (part.strip() for part in _MARK.sub("", text).split("\0"))
    return " ".join(part for part in parts if part)


def is_record(comment: bytes) -> bool:
    """Return True if a comment is our own record."""
    return _MARK.fullmatch(comment.decode("latin-1")) is not None


def read(path: Path) -> Provenance | None:
    """Return the record of a result from the head of the file; None if there is none or it is damaged."""
    try:
        check_file(path)
        with warnings.catch_warnings(action="ignore"), path.open("rb") as stream:
            head = stream.read(8)
            text = _png_text(stream) if head == PNG_SIGNATURE else _other_text(stream, head)
        return _parse(text) if text else None
    except Exception:  # decoders raise errors of any kind
        return None


def is_whole(path: Path) -> bool:
    """Return True if a result can be read to its end.

    A PNG is checked by its checksums; others are decoded, except for values that Pillow cannot decode.
    """
    try:
        check_file(path)
        with warnings.catch_warnings(action="ignore"), path.open("rb") as stream:
            head = stream.read(8)
            if head == PNG_SIGNATURE:
                return any(kind == b"IEND" for kind, _ in png_chunks.chunks(stream))
            tiff = head.startswith(_TIFF)
            if tiff and _ends(stream) > path.stat().st_size:
                return False
            try:
                image = _open(stream, head)
            except SyntaxError:  # Pillow knows no mode for such values
                return tiff
            if image is not None:
                image.load()
            return image is not None
    except Exception:
        return False


def _parse(text: str) -> Provenance | None:
    values = json.loads(text)
    if not isinstance(values, dict) or KEY not in values:
        return None
    texts = [values[key] for key in ("engine", "source", "source_sha256", KEY)]
    engine, source, digest, version = map(str, texts)
    settings, origin = dict(values["settings"]), str(values.get("engine_origin", ""))
    return Provenance(int(values["scale"]), engine, settings, source, digest, version, origin)


def _png_text(stream: BinaryIO) -> str | None:
    for kind, data in png_chunks.chunks(stream):
        if kind == b"tEXt" and data.startswith(KEY.encode() + b"\0"):
            return data.partition(b"\0")[2].decode("latin-1")
        if kind == b"IDAT":
            break
    return None


def _other_text(stream: BinaryIO, head: bytes) -> str | None:
    if head.startswith(_TIFF):
        match = _MARK.search(str(_directory(stream).get(_SOFTWARE, "")))
        return match[1] if match else None
    image = _open(stream, head)
    if image is None:
        return None
    if image.format in ("JPEG", "MPO"):
        comments = [data for marker, data in getattr(image, "applist", ()) if marker == "COM"]
        texts = [comment.decode("latin-1") for comment in comments]
    else:
        texts = [str(image.getexif().get(_SOFTWARE, ""))]
    found = [match[1] for match in map(_MARK.search, texts) if match]
    return found[-1] if found else None


def _directory(stream: BinaryIO) -> ImageFileDirectory_v2:
    """Return the tags of a TIFF's first page; Pillow cannot open all of those that are written here."""
    stream.seek(0)
    head = stream.read(8)
    directory = ImageFileDirectory_v2(head + (stream.read(8) if head.startswith(b"II+") else b""))
    stream.seek(directory.next)
    directory.load(stream)
    return directory


def _ends(stream: BinaryIO) -> int:
    """Return the position after the last pixel of a TIFF's first page."""
    directory = _directory(stream)
    places, sizes = next((directory[a], directory[b]) for a, b in _STRIPS if a in directory)
    return max(place + size for place, size in zip(places, sizes, strict=True))


def _open(stream: BinaryIO, head: bytes) -> Image.Image | None:
    """Open the file with Pillow, whatever its size: results may exceed the limit for inputs."""
    stream.seek(0)
    libtiff.silence()
    Image.init()
    for signature, name in _KINDS:
        if head.startswith(signature) and name in Image.OPEN:
            return Image.OPEN[name][0](stream, "")  # not Image.open, which limits the number of pixels
    return None
