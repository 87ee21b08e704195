"""The inputs of a run on a cluster: images of places, each with the key of its result, in a stream.

Nothing here holds more than one page of a listing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moesr.runtime.cli.outputs import Naming
from moesr.runtime.cluster.places import Place, parent_of, place_of
from moesr.runtime.errors import InputError
from moesr.runtime.images.reading import READ_SUFFIXES


@dataclass(frozen=True)
class Row:
    """An input of a run as it is sent to a worker; its pixels stay where they are."""

    source: str  # path or URL of a place
    key: str
    seconds: float  # time of its last change
    target: str  # key of the result
    listed: bool  # found in a place, not named

    def values(self) -> dict[str, Any]:
        """Return the columns of a table of rows."""
        return asdict(self)


@dataclass(frozen=True)
class Sources:
    """The places and files of a run. Inputs below the path or URL `skipped` are left out."""

    names: tuple[str, ...]
    naming: Naming
    recursive: bool = False
    skipped: str | None = None

    def rows(self) -> Iterator[Row]:
        """Yield the images of all sources in their order.

        InputError is raised if a source cannot be listed or does not list its keys in order.
        """
        for name in self.names:
            row = self.named(name)
            if row:
                yield row
                continue
            entries = images(place_of(name), self.recursive, self.skipped)
            for key, seconds, alone in with_twins(entries):
                path = PurePosixPath(key)
                short, long = self.naming.first(Path(path.name))
                yield Row(name, key, seconds, str(path.parent / (short if alone else long)), True)

    def named(self, name: str) -> Row | None:
        """Return the row of a source that is a single file; None for a folder or prefix."""
        single = parent_of(name)
        if not single:
            return None
        place, key = single
        found = place.find(key)
        seconds = found.seconds if found else 0.0
        return Row(place.name("").rstrip("/"), key, seconds, self.naming.first(Path(key))[0], False)


def images(place: Place, recursive: bool, skipped: str | None = None) -> Iterator[tuple[str, float]]:
    """Yield the keys of a place that have the suffix of an image, without hidden ones."""
    for key, seconds in place.entries(recursive):
        name = key.rpartition("/")[2]
        hidden = key.startswith(".") or "/." in key
        if hidden or (skipped and f"{place.name(key)}/".startswith(skipped)):
            continue
        if f".{name.rpartition('.')[2].lower()}" in READ_SUFFIXES:
            yield key, seconds


def with_twins(entries: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float, bool]]:
    """Yield entries in order, each with whether another entry differs from it only in the extension.

    Names with the stem s lie between "s." and "s/" in an ordered listing, so only the stems that a later name
    may share are held: as many as one name has dots. Raises InputError if names of a directory are not in
    order.
    """
    open_stems: dict[
        str, list[tuple[str, float]]
    ] = {}  # by directory and stem; each begins with the previous ones
    last = ""
    for key, seconds in entries:
        stem = key.rpartition(".")[0]
        if key < last and key.rpartition("/")[0] == last.rpartition("/")[0]:
            raise InputError(f"{key}: is listed after {last}; the store must list its keys in order")
        last = key
        for closed in [known for known in open_stems if not key.startswith(f"{known}.")]:
            yield from _told_apart(open_stems.pop(closed))
        open_stems.setdefault(stem, []).append((key, seconds))
    for group in open_stems.values():
        yield from _told_apart(group)


def _told_apart(group: list[tuple[str, float]]) -> Iterator[tuple[str, float, bool]]:
    return ((key, seconds, len(group) == 1) for key, seconds in group)
