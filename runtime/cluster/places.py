"""Folders and buckets as sources and destinations of a run: keys in order, files fetched and delivered.

Buckets (s3://, gs://, az://) are reached through obstore, which takes addresses and credentials from the
environment of each node, such as AWS_ENDPOINT_URL. A key is the name of a file relative to the place, with
slashes.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from moesr.runtime.errors import InputError, OutputError, UsageError
from moesr.runtime.images import provenance
from moesr.runtime.images.formats import PNG_SIGNATURE
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.system.files import check_writable, examine, kind_of, reason, write_atomically

SCHEMES = ("s3", "gs", "az", "file")

HEAD_BYTES = 1 << 16
"""The number of bytes at the beginning of a PNG in which its record is searched first."""

CHUNK = 8 << 20

RETRIES: dict[str, Any] = {
    "max_retries": 30,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=15), "base": 2},
}
"""A request to which a store answers 5xx or 429, or not at all, is repeated for up to three minutes."""

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://")


@dataclass(frozen=True)
class Found:
    """A file of a place. `seconds` is the time of its last change, as the place reports it."""

    record: Provenance | None  # None: the file is not a result
    seconds: float


class Place(Protocol):
    """A folder or a bucket with a prefix."""

    @property
    def keeps_dates(self) -> bool:
        """Whether a file can have an older date than its arrival here, so that its date proves nothing."""
        ...

    def name(self, key: str) -> str:
        """Return the path or URL of a key, for messages."""
        ...

    def entries(self, recursive: bool) -> Iterator[tuple[str, float]]:
        """Yield keys with the seconds of their last change, as they are read from the place.

        Keys that share a directory are in the order of their names. InputError is raised if the place cannot
        be listed.
        """
        ...

    def fetch(self, key: str, folder: Path) -> tuple[Path, str]:
        """Return a file with the content and name of a key, and a text that changes when the key changes.

        The file is the original or a copy in `folder`. Raises InputError.
        """
        ...

    def version(self, key: str) -> str:
        """Return the text that `fetch` returned, for the current state."""
        ...

    def find(self, key: str) -> Found | None:
        """Return the facts about a key, or None if it does not exist. Raises OutputError."""
        ...

    def deliver(self, path: Path, key: str) -> None:
        """Copy a file to a key, completely or not at all. Raises OutputError or OSError."""
        ...


def is_url(text: str) -> bool:
    """Return True if a text is a URL rather than a path."""
    return _URL.match(text) is not None


def place_of(text: str) -> Place:
    """Return the place of a path or URL; UsageError for a URL of another scheme."""
    match = _URL.match(text)
    if not match:
        return Folder(Path(text).absolute())
    if match[1] == "file":
        return Folder(Path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path)))
    if match[1] not in SCHEMES:
        raise UsageError(f"{text}: expected a folder, or a URL of {', '.join(f'{s}://' for s in SCHEMES)}")
    return Bucket(text.rstrip("/"))


def parent_of(text: str) -> tuple[Place, str] | None:
    """Return the place and key of a single file at a path or URL; None for a folder or prefix."""
    if not is_url(text) or text.startswith("file:"):
        folder = place_of(text)
        assert isinstance(folder, Folder)
        status = examine(folder.path)
        single = status is not None and kind_of(status) == "file"
        return (Folder(folder.path.parent), folder.path.name) if single else None
    parent, _, key = text.rpartition("/")
    if not key or parent.endswith("/"):  # a whole bucket
        return None
    bucket = place_of(parent)
    return (bucket, key) if bucket.find(key) else None


@dataclass(frozen=True)
class Folder:
    """A folder that all nodes see under the same path."""

    path: Path
    keeps_dates = True

    def name(self, key: str) -> str:
        """See `Place.name`."""
        return str(self.path / key)

    def entries(self, recursive: bool) -> Iterator[tuple[str, float]]:
        """See `Place.entries`; one directory at a time is sorted."""
        yield from self._walk(self.path, "", recursive)

    def _walk(self, directory: Path, prefix: str, recursive: bool) -> Iterator[tuple[str, float]]:
        try:
            paths = sorted(directory.iterdir(), key=lambda path: path.name)
        except OSError as error:
            raise InputError(f"{directory}: cannot be read: {reason(error)}") from error
        for path in paths:
            if path.name.startswith("."):
                continue
            with contextlib.suppress(OSError):
                if not path.is_dir():
                    yield prefix + path.name, path.stat().st_mtime
        for path in paths:
            if recursive and not path.name.startswith(".") and path.is_dir() and not path.is_symlink():
                yield from self._walk(path, f"{prefix}{path.name}/", recursive)

    def fetch(self, key: str, folder: Path) -> tuple[Path, str]:
        """See `Place.fetch`."""
        return self.path / key, ""  # the reader notices if the file changes meanwhile

    def version(self, key: str) -> str:
        """See `Place.version`."""
        return ""

    def find(self, key: str) -> Found | None:
        """See `Place.find`; an incomplete result counts as absent."""
        path = self._inside(key)
        status = examine(path, OutputError)
        if status is None or (kind_of(status) == "file" and status.st_size == 0):
            return None
        record = provenance.read(path)
        if record and not provenance.is_whole(path):
            return None
        return Found(record, status.st_mtime)

    def deliver(self, path: Path, key: str) -> None:
        """See `Place.deliver`."""
        with path.open("rb") as source, write_atomically(self._inside(key)) as target:
            shutil.copyfileobj(source, target, CHUNK)

    def _inside(self, key: str) -> Path:
        """Return the path of a key; OutputError if it would lie outside of the folder."""
        if ".." in PurePosixPath(key).parts or key.startswith("/"):
            raise OutputError(f"{key}: lies outside of {self.path}; rename the input")
        return self.path / key


@dataclass(frozen=True)
class Bucket:
    """The keys of an object store below a URL."""

    url: str
    keeps_dates = False

    def name(self, key: str) -> str:
        """See `Place.name`."""
        return f"{self.url}/{key}"

    @property
    def _store(self) -> Any:
        return _open_store(self.url)

    def entries(self, recursive: bool) -> Iterator[tuple[str, float]]:
        """See `Place.entries`; one page of the store's listing is in memory at a time."""
        obstore = _obstore()
        try:
            for page in obstore.list(self._store, chunk_size=1000):
                for found in page:
                    if recursive or "/" not in found["path"]:
                        yield found["path"], found["last_modified"].timestamp()
        except _errors() as error:
            raise InputError(f"{self.url}: cannot be listed: {said(error)}") from error

    def fetch(self, key: str, folder: Path) -> tuple[Path, str]:
        """See `Place.fetch`."""
        path = folder / PurePosixPath(key).name
        try:
            found = _obstore().get(self._store, key)
            with path.open("wb") as stream:
                for part in found.stream(min_chunk_size=CHUNK):
                    stream.write(part)
        except _errors() as error:
            raise InputError(f"{self.name(key)}: cannot be read: {said(error)}") from error
        if path.stat().st_size != found.meta["size"]:
            raise InputError(f"{self.name(key)}: ended early; run again")
        return path, _tag(found.meta)

    def version(self, key: str) -> str:
        """See `Place.version`."""
        try:
            return _tag(_obstore().head(self._store, key))
        except _errors() as error:
            raise InputError(f"{self.name(key)}: cannot be read: {said(error)}") from error

    def find(self, key: str) -> Found | None:
        """See `Place.find`; the head of a PNG is read, and files of other formats are read completely."""
        try:
            found = _obstore().get(self._store, key)
            seconds = found.meta["last_modified"].timestamp()
            if not found.meta["size"]:
                return None
            with tempfile.NamedTemporaryFile(prefix="moesr-") as scratch:
                for number, part in enumerate(found.stream(min_chunk_size=HEAD_BYTES)):
                    scratch.write(part)
                    scratch.flush()
                    if number == 0 and bytes(part).startswith(PNG_SIGNATURE):
                        record = provenance.read(Path(scratch.name))
                        if record:
                            return Found(record, seconds)
                return Found(provenance.read(Path(scratch.name)), seconds)
        except FileNotFoundError:
            return None
        except _errors() as error:
            raise OutputError(f"{self.name(key)}: cannot be examined: {said(error)}") from error

    def deliver(self, path: Path, key: str) -> None:
        """See `Place.deliver`; a large file is sent in parts, and the store shows it after the last part."""
        try:
            _obstore().put(self._store, key, path)
        except _errors() as error:
            raise OutputError(f"{self.name(key)}: cannot be written: {said(error)}") from error


def check_place(place: Place) -> None:
    """Raise OutputError if nothing can be written to a place, as far as this is known beforehand."""
    if isinstance(place, Folder):
        check_writable(place.path)
    else:
        place.find("moesr")


def said(error: Exception) -> str:
    """Return the first line of an object store's message, without the pages of details."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    return f"{lines[0].split(': <')[0].rstrip(': ')}{f' ({code[1]})' if code else ''}"


def _tag(meta: Any) -> str:
    return (meta["e_tag"] or f"{meta['size']} {meta['last_modified']}").strip('"')


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as error:
        raise missing("obstore") from error
    return obstore


def _errors() -> tuple[type[Exception], ...]:
    _obstore()  # which reports that it is missing
    from obstore.exceptions import BaseError

    return BaseError, OSError, ValueError


def _open_store(url: str) -> Any:
    if url not in _stores:
        _obstore()
        import obstore.store

        open_url: Any = obstore.store.from_url
        try:
            _stores[url] = open_url(url, retry_config=RETRIES)
        except _errors() as error:
            raise UsageError(f"{url}: is not a usable URL of an object store: {said(error)}") from error
    return _stores[url]


_stores: dict[str, Any] = {}  # a store keeps its connections


def missing(library: str, extra: str = "ray") -> UsageError:
    """Return the error that says with which extra a library comes."""
    return UsageError(f"{library} is not installed; install it with: pip install 'moesr[{extra}]'")
