"""Result files: their names, which inputs are already done, and which files may be overwritten.

A result is recognized by the record in it (see `images/provenance.py`), not by its name.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moesr.runtime.cli import inputs
from moesr.runtime.cli.inputs import Input, Listing, is_directory
from moesr.runtime.errors import InputError, OutputError, UsageError
from moesr.runtime.images import provenance
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.writing import WRITE_FORMATS, check_output
from moesr.runtime.system import file_hashes
from moesr.runtime.system.file_hashes import Stamp
from moesr.runtime.system.files import check_file, check_writable, examine, kind_of, reason

NAME_BYTES = 255
"""The longest file name on common file systems, unless the system reports another limit."""


@dataclass(frozen=True)
class Naming:
    """The names of results: the input's name, then `suffix`, then the extension of the format."""

    suffix: str
    extension: str = ".png"

    def first(self, source: Path) -> tuple[str, str]:
        """Return the usual name, and the name for inputs that differ from others in their extension only."""
        return self._name(source.stem), self._name(source.name.replace(".", "_"))

    def later(self, source: Path) -> Iterator[str]:
        """Yield further names, numbered from 2."""
        return (self._name(source.name.replace(".", "_"), f"_{n}") for n in itertools.count(2))

    def _name(self, stem: str, number: str = "") -> str:
        return shorten(stem, f"{number}{self.suffix}{self.extension}")


def shorten(stem: str, ending: str, limit: int = NAME_BYTES) -> str:
    """Return `stem` and `ending` as a file name of at most `limit` bytes.

    A stem that is too long is cut, and eight hexadecimal digits of its hash distinguish it from others.
    """
    if len(os.fsencode(stem + ending)) <= limit:
        return stem + ending
    ending = f"_{hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]}{ending}"
    while stem and len(os.fsencode(stem + ending)) > limit:
        stem = stem[:-1]
    return stem + ending


@dataclass(frozen=True)
class Task:
    """An input file and the path of its result.

    `digest` is the SHA-256 of the input as it was at `stamp`, if it had to be compared with a result.
    """

    source: Path
    target: Path
    digest: str = ""
    stamp: Stamp | None = None


@dataclass
class OutputPlan:
    """The inputs of a run, and the names of their results."""

    listing: Listing
    names: OutputNames
    notes: list[str] = field(default_factory=list)

    def decide(self, found: Input) -> Task | str:
        """Return the task for an input, or a line that says why its result need not be made.

        The decisions depend on each other, so inputs must be passed in the order of the listing. Raises
        InputError or OutputError if the input cannot be done.
        """
        try:
            check_file(found.path)
            return self.names.decide(found)
        except OSError as error:
            raise InputError(f"{found.path}: cannot be read: {reason(error)}") from error


def plan(
    paths: Sequence[Path],
    output: str | None,
    wanted: Provenance,
    force: bool,
    *,
    naming: Naming | None = None,
    recursive: bool = False,
    ignored: frozenset[str] = frozenset(),
) -> OutputPlan:
    """Find the inputs and prepare the names of their results; no image is hashed or decoded.

    Without `output`, results go beside their inputs, as `{stem}_x{scale}.png` unless `naming` says otherwise;
    for `output` see `check_usage`. The results of a directory that is searched recursively go into the same
    subdirectories of `output`.

    A complete result is not made again unless `force` is set. If it differs from `wanted` (engine, settings)
    in more than the `ignored` settings, this is an error for an input that was named. If another input or its
    result has the name of a result, the next free name is used (`{stem}_{suffix}`, `{stem}_{suffix}_2`, ...).
    Any other file is only replaced with `force`: without it, an input that was named is refused, and one from
    a directory gets the next name.
    """
    naming = naming or Naming(f"_x{wanted.scale}")
    directory = check_usage(paths, output)
    listing = inputs.find(paths, recursive=recursive, ignored=directory)
    places = [[found.path.with_name(name) for name in naming.first(found.path)] for found in listing.inputs]
    results = inputs.remove_results(listing, places)
    one = Path(output) if output is not None and directory is None else None
    names = OutputNames(listing.inputs, wanted, naming, force, place=directory, one=one, ignored=ignored)
    notes = [f"{folder}: ignored, results of its images ({count})" for folder, count in results.items()]
    return OutputPlan(listing, names, listing.notes + notes)


def check_usage(paths: Sequence[Path], output: str | None) -> Path | None:
    """Return the directory that `output` names; None if it names a file or is None.

    It names a directory if it is one, ends in a slash or has no extension, and also if it must hold several
    results and its extension is not that of an image. Raises UsageError for a file in place of a directory
    and for an unknown extension, and OutputError if the directory cannot be created or written to.
    """
    if output is None:
        return None
    path = Path(output)
    status = examine(path, OutputError)
    there = kind_of(status) if status else "nothing"
    several = len(paths) > 1 or is_directory(paths[0])
    slash = output.endswith(("/", os.sep))
    if several and there == "nothing" and not slash and path.suffix.lower() in WRITE_FORMATS:
        what = "a directory" if len(paths) == 1 else f"{len(paths)} inputs"
        raise UsageError(
            f"{path}: is the name of one image, but {what} may have several results; "
            f"name a directory, such as {path.with_suffix('')}/"
        )
    if several or there == "directory" or slash or (there == "nothing" and not path.suffix):
        if there not in ("directory", "nothing"):
            raise UsageError(f"{path}: is a {there}, expected a directory for the results")
        check_writable(path)
        return path
    try:
        check_output(path)
    except UsageError as error:
        raise UsageError(f"{error}; for a directory, write {path}/") from error
    check_writable(path.parent)
    return None


class OutputNames:
    """Decides for each input of a run, in order, whether there is work to do and how its result is named."""

    def __init__(
        self,
        listed: Sequence[Input],
        wanted: Provenance,
        naming: Naming,
        force: bool,
        *,
        place: Path | None = None,
        one: Path | None = None,
        ignored: frozenset[str] = frozenset(),
        taken: set[str] | None = None,
    ) -> None:
        """Start with the names of `taken` in use, to which the names of results are added.

        `place` is the directory of all results, `one` the file of the only result.
        """
        self._wanted, self._naming, self._force = wanted, naming, force
        self._place, self._one, self._ignored = place, one, ignored
        self._sources = {_key(found.path) for found in listed}
        self._stems = Counter(self._folder(found) / found.path.stem for found in listed)
        self._taken: set[str] = set() if taken is None else taken
        self._folders: dict[Path, OutputError | None] = {}

    def decide(self, found: Input) -> Task | str:
        """Return the task for an input, or the line that says that it is done.

        OutputError if it cannot be done.
        """
        source, folder = found.path, self._folder(found)
        stamp = Stamp.of(source.stat())
        digest = ""
        for target in self._earlier(source, folder):
            record = None if _key(target) in self._taken else provenance.read(target)
            if not record or (record.source, record.scale) != (source.name, self._wanted.scale):
                continue
            digest = digest or ("" if self._force else file_hashes.sha256_of(source))
            if not self._is_own(record, digest, target, source):
                continue
            self._taken.add(_key(target))
            if line := self._finished(found, target, record, self._wanted.of(source.name, digest)):
                return line
            self._check_folder(folder)
            return Task(source, target, digest, stamp)
        self._check_folder(folder)
        target = self._one or self._free(found, folder)
        self._check_target(source, target)
        self._taken.add(_key(target))
        return Task(source, target, digest, stamp)

    def _earlier(self, source: Path, folder: Path) -> Iterator[Path]:
        """Return files that may be the result of a source from an earlier run."""
        if self._one:
            yield self._one
            return
        yield from (folder / name for name in self._naming.first(source))
        later = (folder / name for name in self._naming.later(source))
        yield from itertools.takewhile(lambda path: examine(path, OutputError) is not None, later)

    def _is_own(self, record: Provenance, digest: str, target: Path, source: Path) -> bool:
        """Return True if a result was made from this file, or lies beside it and names it as its source."""
        return self._force or record.digest == digest or _real(target.parent) == _real(source.parent)

    def _finished(self, found: Input, target: Path, record: Provenance, wanted: Provenance) -> str:
        """Return the line that says that an input is done; "" if its result has to be made again."""
        if self._force or not provenance.is_whole(target):
            return ""
        return skip_line(str(found.path), str(target), record, wanted, self._ignored, named=not found.listed)

    def _free(self, found: Input, folder: Path) -> Path:
        """Return the first name that is not in use."""
        short, long = self._naming.first(found.path)
        first = [long] if self._stems[folder / found.path.stem] > 1 else [short, long]
        names = itertools.chain(first, self._naming.later(found.path))
        return next(target for target in map(folder.joinpath, names) if self._is_free(target, found.listed))

    def _is_free(self, target: Path, listed: bool) -> bool:
        """Return True if this name can be used; a named input may also get the name of a file not from moesr.

        `_check_target` then reports that file, while an input from a directory gets the next name.
        """
        if _key(target) in self._taken or _key(target) in self._sources or provenance.read(target):
            return False
        return not listed or self._is_vacant(target) or (self._force and target.is_file())

    def _is_vacant(self, target: Path) -> bool:
        status = examine(target, OutputError)
        return status is None or (kind_of(status) == "file" and status.st_size == 0)

    def _check_target(self, source: Path, target: Path) -> None:
        """Raise OutputError if a result may not be written over the file that is there."""
        if self._is_vacant(target):
            return
        status = examine(target, OutputError)
        kind = kind_of(status) if status else "file"
        if _real(target) == _real(source):
            raise OutputError(f"{source}: its own result would overwrite it; name another file with -o")
        if kind != "file":
            raise OutputError(f"{target}: is a {kind}; name another file with -o")
        if not self._force:
            raise OutputError(
                f"{target}: exists and is not a result of {source}; "
                "pass --force to overwrite it, or name another file with -o"
            )

    def _folder(self, found: Input) -> Path:
        if self._one:
            return self._one.parent
        return self._place / found.folder if self._place else found.path.parent

    def _check_folder(self, folder: Path) -> None:
        if folder not in self._folders:
            try:
                check_writable(folder)
                self._folders[folder] = None
            except OutputError as error:
                self._folders[folder] = OutputError(f"{error}; name another place with -o")
        problem = self._folders[folder]
        if problem:
            raise problem


def skip_line(
    source: str,
    target: str,
    record: Provenance,
    wanted: Provenance,
    ignored: frozenset[str] = frozenset(),
    *,
    named: bool = False,
) -> str:
    """The line that says that `source` is skipped because its result `target` exists.

    A result that differs from `wanted` in more than the `ignored` settings is an OutputError if the source
    was `named` rather than found in a directory.
    """
    same = {name: record.settings.get(name) for name in ignored if name in record.settings}
    differences = record.differences(replace(wanted, settings={**wanted.settings, **same}))
    if differences and named:
        raise OutputError(
            f"{source}: {target} exists, made with {differences}; pass --force to make it again"
        )
    made = f", made with {differences}" if differences else ""
    return f"{source}: skipped, {target} exists{made} (--force makes it again)"


def _real(path: Path) -> str:
    return os.path.realpath(path)


def _key(path: Path) -> str:
    """Return a key that is equal for two paths of one file, also on systems that ignore case."""
    return f"{_real(path.parent)}/{path.name}".casefold()
