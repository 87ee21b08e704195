"""The mark in every result: of which input, by which engine and with which settings it was made.

A line of JSON: the text chunk "moesr" of a PNG, the comment of a JPEG, the end of the Software tag of TIFF
and WebP. BMP has no place for it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from moesr.runtime.images import libtiff
from moesr.runtime.system.files import check_file

KEY = "moesr"
_MARK = re.compile(r"(?:; )?moesr (\{.*\})\s*\Z", re.DOTALL)
_SOFTWARE = 0x0131
_PNG = b"\x89PNG\r\n\x1a\n"
_KINDS = ((b"\xff\xd8\xff", "JPEG"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"RIFF", "WEBP"))


@functools.cache
def _version() -> str:
    return importlib.metadata.version("moesr")


@dataclass(frozen=True)
class Provenance:
    """What a result was made of. `digest` is the SHA-256 of the input file, `source` its name."""

    scale: int
    engine: str
    settings: Mapping[str, Any]
    source: str = ""
    digest: str = ""
    version: str = field(default_factory=_version)

    def of(self, source: str, digest: str) -> Provenance:
        """The same for a result of this source."""
        return replace(self, source=source, digest=digest)

    def to_json(self) -> str:
        """One line of ASCII."""
        values = {KEY: self.version, "source": self.source, "source_sha256": self.digest}
        return json.dumps(
            values | {"scale": self.scale, "engine": self.engine, "settings": dict(self.settings)}
        )

    def differences(self, wanted: Provenance) -> str:
        """What differs in how it was made from what is wanted, as "steps 20 (now 50), ..."; "" if nothing."""
        before = {"engine": self.engine, **self.settings}
        after = {"engine": wanted.engine, **wanted.settings}
        changed = [k for k in before | after if before.get(k) != after.get(k)]
        parts = [f"{k} {before.get(k)} (now {after.get(k)})" for k in changed]
        if self.digest != wanted.digest:
            parts.append(f"another version of {self.source}")
        return ", ".join(parts)


def to_software(earlier: str | None, record: Provenance) -> str:
    """Text of a Software tag that holds the record after what was there."""
    kept = without_mark(earlier or "")
    return f"{kept}; moesr {record.to_json()}" if kept else f"moesr {record.to_json()}"


def without_mark(text: str) -> str:
    """A Software tag as it was before `to_software`."""
    return _MARK.sub("", text)


def read(path: Path) -> Provenance | None:
    """The record of a result, from the head of the file; None where it is no result, or is damaged there."""
    try:
        check_file(path)
        with warnings.catch_warnings(action="ignore"), path.open("rb") as stream:
            head = stream.read(8)
            text = _png_text(stream) if head == _PNG else _other_text(stream, head)
        return _parse(text) if text else None
    except Exception:  # decoders raise whatever they meet
        return None


def is_whole(path: Path) -> bool:
    """Whether a result can be read to its end: a PNG by its checksums, others by decoding them."""
    try:
        check_file(path)
        with warnings.catch_warnings(action="ignore"), path.open("rb") as stream:
            head = stream.read(8)
            if head == _PNG:
                return any(kind == b"IEND" for kind, _ in _chunks(stream))
            image = _open(stream, head)
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
    return Provenance(int(values["scale"]), engine, dict(values["settings"]), source, digest, version)


def _chunks(stream: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Kinds and data of a PNG's chunks up to IEND; ValueError or struct.error where one is damaged."""
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", stream.read(8))
        data = stream.read(length)
        if struct.unpack(">I", stream.read(4))[0] != zlib.crc32(kind + data):
            raise ValueError("a chunk is damaged")
        yield kind, data


def _png_text(stream: BinaryIO) -> str | None:
    for kind, data in _chunks(stream):
        if kind == b"tEXt" and data.startswith(KEY.encode() + b"\0"):
            return data.partition(b"\0")[2].decode("latin-1")
        if kind == b"IDAT":
            break
    return None


def _other_text(stream: BinaryIO, head: bytes) -> str | None:
    image = _open(stream, head)
    if image is None:
        return None
    comment = image.info.get("comment") if image.format in ("JPEG", "MPO") else None
    text = comment.decode("latin-1") if comment else str(image.getexif().get(_SOFTWARE, ""))
    match = _MARK.search(text)
    return match[1] if match else None


def _open(stream: BinaryIO, head: bytes) -> Image.Image | None:
    """The file as Pillow reads it, of any size: results are larger than what is taken as an input."""
    stream.seek(0)
    libtiff.silence()
    Image.init()
    for signature, name in _KINDS:
        if head.startswith(signature) and name in Image.OPEN:
            return Image.OPEN[name][0](stream, "")  # not Image.open, which has a limit on pixels
    return None
