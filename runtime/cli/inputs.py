"""The input files of a run: the files that are named and the images of directories, without repetitions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moesr.runtime.errors import InputError, MoesrError
from moesr.runtime.images import provenance
from moesr.runtime.images.reading import READ_SUFFIXES
from moesr.runtime.system.files import check_file, examine, kind_of, reason


@dataclass(frozen=True)
class Input:
    """An input file and how it was found."""

    path: Path
    listed: bool = False  # found in a directory, not named
    folder: Path = Path()  # its directory, relative to the directory that was named


@dataclass
class Listing:
    """The inputs of a run in order, and messages for the user about all other files."""

    inputs: list[Input] = field(default_factory=list)
    failed: list[tuple[Path, MoesrError]] = field(default_factory=list)  # paths that cannot be used
    notes: list[str] = field(default_factory=list)  # lines about files that are ignored


def find(
    paths: Sequence[Path],
    *,
    recursive: bool = False,
    ignored: Path | None = None,
    suffixes: Collection[str] = READ_SUFFIXES,
    noun: str = "images",
) -> Listing:
    """List the files that are named, and the images of directories in the order of their names.

    `recursive` includes subdirectories, except hidden ones and the directory `ignored`. Other kinds of files
    than images have other `suffixes` and another `noun`.
    """
    listing = Listing()
    search = _Search(listing, recursive, os.path.realpath(ignored) if ignored else None, suffixes, noun)
    for path in paths:
        try:
            listing.inputs.extend(search.expand(path))
        except InputError as error:
            listing.failed.append((path, error))
    return listing


def is_directory(path: Path) -> bool:
    """Return True if a path leads to a directory; False if it cannot be examined."""
    try:
        status = examine(path)
    except InputError:
        return False
    return status is not None and kind_of(status) == "directory"


def remove_results(listing: Listing, result_names: Sequence[Sequence[Path]]) -> dict[Path, int]:
    """Remove results of other inputs from a listing, and empty files that have the name of a result.

    `result_names` are the paths of the results of each input. Returns the number of results by directory.
    """
    sources = {os.path.realpath(found.path) for found in listing.inputs}
    places = {path for names in result_names for path in names}
    kept, results = [], []
    for found in listing.inputs:
        record = provenance.read(found.path)
        origin = os.path.realpath(found.path.with_name(record.source)) if record else ""
        if origin in sources and origin != os.path.realpath(found.path):
            results.append(found.path)
        elif not (found.path in places and _is_empty(found.path)):
            kept.append(found)
    listing.inputs = kept
    return Counter(path.parent for path in results)


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False


class _Search:
    """Walks through the paths of one command; each file and directory is visited once."""

    def __init__(
        self, listing: Listing, recursive: bool, ignored: str | None, suffixes: Collection[str], noun: str
    ) -> None:
        self._listing, self._recursive, self._ignored = listing, recursive, ignored
        self._suffixes, self._noun = suffixes, noun
        self._seen: dict[str, Path] = {}

    def expand(self, path: Path) -> Iterator[Input]:
        """Return the inputs that a path stands for; InputError if it cannot be used."""
        if is_directory(path):
            if self._is_new(path, "input"):
                yield from self._walk(path, Path())
        else:
            check_file(path)
            if self._is_new(path, "input"):
                yield Input(path)

    def _is_new(self, path: Path, kind: str) -> bool:
        real = os.path.realpath(path)
        if real in self._seen:
            self._listing.notes.append(f"{path}: ignored, the same {kind} as {self._seen[real]}")
            return False
        self._seen[real] = path
        return True

    def _walk(self, root: Path, folder: Path) -> Iterator[Input]:
        images, folders = self._contents(root / folder)
        for path in images:
            if self._is_new(path, "file"):
                yield Input(path, True, folder)
        for path in folders:
            if os.path.realpath(path) != self._ignored and self._is_new(path, "directory"):
                try:
                    yield from self._walk(root, path.relative_to(root))
                except InputError as error:
                    self._listing.failed.append((path, error))

    def _contents(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Return the image files and the subdirectories to visit, by name; other entries are noted."""
        images: list[Path] = []
        folders: list[Path] = []
        others: list[str] = []
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            raise InputError(f"{folder}: cannot be read: {reason(error)}") from error
        for path in paths:
            if path.name.startswith("."):
                continue
            try:
                status = examine(path)
            except InputError as error:
                self._listing.failed.append((path, error))
                continue
            kind = kind_of(status) if status else "link to a file that does not exist"
            if kind == "directory" and self._recursive:
                folders.append(path)
            elif kind != "file":
                cure = f"; --recursive includes its {self._noun}" if kind == "directory" else ""
                self._listing.notes.append(f"{path}: ignored, a {kind}{cure}")
            elif path.suffix.lower() in self._suffixes:
                images.append(path)
            else:
                others.append(path.name)
        if others:
            names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            self._listing.notes.append(f"{folder}: ignored, not {self._noun}: {names} ({len(others)} in all)")
        return images, folders
