"""Which file each input becomes: directories opened, names chosen, nothing overwritten by accident.

A result is known by the record in it (see marks.py), not by its name.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moesr.runtime.errors import InputError, MoesrError, OutputError, UsageError
from moesr.runtime.images import provenance
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.reading import READ_SUFFIXES
from moesr.runtime.images.writing import check_output
from moesr.runtime.system.files import check_file, check_writable, examine, kind_of, reason, sha256_of


@dataclass(frozen=True)
class Task:
    """An input file to be done, and where its result goes."""

    source: Path
    target: Path


@dataclass
class OutputPlan:
    """What a run has to do; the lists of text hold one line for the user each."""

    tasks: list[Task] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # inputs whose results exist
    failed: list[MoesrError] = field(default_factory=list)  # inputs that cannot be done
    notes: list[str] = field(default_factory=list)  # what is no input


def plan(inputs: Sequence[Path], output: str | None, wanted: Provenance, force: bool) -> OutputPlan:
    """One task a file, in the order given; the images of a directory in the order of their names.

    Without `output`, results go beside their inputs as `{stem}_x{scale}.png`; otherwise see `check_usage`.
    A whole result is not made again unless `force`; one that `wanted` (engine, settings) does not describe is
    an error for an input named directly. Where another input or its result has that name, the next one that
    is free is taken (`{stem}_{suffix}`, `{stem}_{suffix}_2`, ...). Any other file is not replaced without
    `force`: an input named directly is refused then, one from a directory gets the next name.
    """
    directory = check_usage(inputs, output)
    made = OutputPlan()
    found, results = _without_results(list(_expand(inputs, made)), f"_x{wanted.scale}.png")
    if output is not None and directory is None:
        choose = OutputNames([], wanted, force, Path(output))
    else:
        choose = OutputNames([source for source, _ in found], wanted, force, directory)
    for source, listed in found:
        try:
            check_file(source)
            target, line = choose.target(source, listed)
        except (MoesrError, OSError) as error:
            made.failed.append(
                error if isinstance(error, MoesrError) else InputError(_unreadable(source, error))
            )
            continue
        results.discard(target)
        if line:
            made.skipped.append(line)
        else:
            made.tasks.append(Task(source, target))
    for folder, count in Counter(path.parent for path in results).items():
        made.notes.append(f"{folder}: passed over, results of its images ({count})")
    return made


def check_usage(inputs: Sequence[Path], output: str | None) -> Path | None:
    """The directory that `output` names, None where it names a file or nothing.

    It is a directory where it is one already, ends in a slash, or has to take the results of several inputs
    or of a directory. Raises UsageError for a file where a directory is needed, or of unknown kind, and
    OutputError where the directory cannot be made or written to.
    """
    if output is None:
        return None
    path = Path(output)
    status = examine(path, OutputError)
    there = kind_of(status) if status else "nothing"
    if len(inputs) > 1 or there == "directory" or output.endswith(("/", os.sep)) or _is_directory(inputs[0]):
        if there not in ("directory", "nothing"):
            raise UsageError(f"{path}: is a {there}, expected a directory for the results")
        check_writable(path)
        return path
    check_output(path)
    check_writable(path.parent)
    return None


def _is_directory(path: Path) -> bool:
    try:
        status = examine(path)
    except InputError:
        return False
    return status is not None and kind_of(status) == "directory"


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: cannot be read: {reason(error)}"


def _expand(inputs: Sequence[Path], made: OutputPlan) -> Iterator[tuple[Path, bool]]:
    """Files named, and the images of directories (marked True), each once."""
    seen: dict[str, Path] = {}

    def first(path: Path, listed: bool) -> bool:
        earlier = seen.get(_real(path))
        if earlier is not None:
            made.notes.append(f"{path}: passed over, the same {'file' if listed else 'input'} as {earlier}")
            return False
        seen[_real(path)] = path
        return True

    for path in inputs:
        try:
            if not _is_directory(path):
                check_file(path)
                if first(path, False):
                    yield path, False
            elif first(path, False):
                yield from ((image, True) for image in _images(path, made) if first(image, True))
        except InputError as error:
            made.failed.append(error)


def _images(folder: Path, made: OutputPlan) -> list[Path]:
    """The image files of a directory by name; what else is in it is noted."""
    images, others = [], []
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(_unreadable(folder, error)) from error
    for path in paths:
        if path.name.startswith("."):
            continue
        try:
            status = examine(path)
        except InputError as error:
            made.failed.append(error)
            continue
        kind = kind_of(status) if status else "link that leads nowhere"
        if kind != "file":
            cure = "; name it to do its images" if kind == "directory" else ""
            made.notes.append(f"{path}: passed over, a {kind}{cure}")
        elif path.suffix.lower() in READ_SUFFIXES:
            images.append(path)
        else:
            others.append(path.name)
    if others:
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        made.notes.append(f"{folder}: passed over, no images: {names} ({len(others)} in all)")
    return images


def _without_results(
    found: list[tuple[Path, bool]], suffix: str
) -> tuple[list[tuple[Path, bool]], set[Path]]:
    """Take out the results of other inputs of this run, and empty files that stand where a result should."""
    sources = {_real(source) for source, _ in found}
    places = {source.with_name(name) for source, _ in found for name in _first_names(source, suffix)}
    kept, results = [], set[Path]()
    for source, listed in found:
        record = provenance.read(source)
        origin = _real(source.with_name(record.source)) if record else ""
        if origin in sources and origin != _real(source):
            results.add(source)
        elif not (source in places and source.stat().st_size == 0):
            kept.append((source, listed))
    return kept, results


def _first_names(source: Path, suffix: str) -> tuple[str, str]:
    return source.stem + suffix, source.name.replace(".", "_") + suffix


def _later_names(source: Path, suffix: str) -> Iterator[str]:
    return (f"{source.name.replace('.', '_')}_{n}{suffix}" for n in itertools.count(2))


def _real(path: Path) -> str:
    return os.path.realpath(path)


class OutputNames:
    """Chooses the target of each source of a run."""

    def __init__(self, sources: Sequence[Path], wanted: Provenance, force: bool, place: Path | None) -> None:
        """`place` is the directory of all results, or the one result where `sources` is empty."""
        self._wanted, self._force, self._place = wanted, force, place
        self._one = place if place and not sources else None
        self._suffix = f"_x{wanted.scale}.png"
        self._sources = {_key(source) for source in sources}
        self._stems = Counter(self._folder(source) / source.stem for source in sources)
        self._taken: set[str] = set()
        self._folders: dict[Path, OutputError | None] = {}

    def target(self, source: Path, listed: bool) -> tuple[Path, str]:
        """Where the result of a source goes, and why it need not be made, or ""."""
        folder = self._folder(source)
        wanted = self._wanted.of(source.name, sha256_of(source))
        for target in self._earlier(source, folder):
            record = provenance.read(target)
            if _key(target) not in self._taken and record and self._is_own(record, wanted, target, source):
                self._taken.add(_key(target))
                line = self._finished(source, target, record, wanted, listed)
                if not line:
                    self._check_folder(folder)
                return target, line
        self._check_folder(folder)
        target = self._one or self._free(source, folder, listed)
        self._check_target(source, target)
        self._taken.add(_key(target))
        return target, ""

    def _earlier(self, source: Path, folder: Path) -> Iterator[Path]:
        """Where earlier runs may have put the result of a source."""
        if self._one:
            yield self._one
            return
        yield from (folder / name for name in _first_names(source, self._suffix))
        later = (folder / name for name in _later_names(source, self._suffix))
        yield from itertools.takewhile(lambda path: examine(path, OutputError) is not None, later)

    def _is_own(self, record: Provenance, wanted: Provenance, target: Path, source: Path) -> bool:
        """Whether a result is that of a source: made of this file, or beside it and of its name."""
        if (record.source, record.scale) != (wanted.source, wanted.scale):
            return False
        return self._force or record.digest == wanted.digest or _real(target.parent) == _real(source.parent)

    def _finished(
        self, source: Path, target: Path, record: Provenance, wanted: Provenance, listed: bool
    ) -> str:
        """The line that says that a source is done; "" where its result has to be made again."""
        if self._force or not provenance.is_whole(target):
            return ""
        differences = record.differences(wanted)
        if differences and not listed:
            raise OutputError(
                f"{source}: {target} exists, made with {differences}; pass --force to make it again"
            )
        made = f", made with {differences}" if differences else ""
        return f"{source}: skipped, {target} exists{made} (--force does it again)"

    def _free(self, source: Path, folder: Path, listed: bool) -> Path:
        """The first name that is not in use."""
        short, long = _first_names(source, self._suffix)
        first = [long] if self._stems[folder / source.stem] > 1 else [short, long]
        names = itertools.chain(first, _later_names(source, self._suffix))
        return next(target for target in map(folder.joinpath, names) if self._is_free(target, listed))

    def _is_free(self, target: Path, listed: bool) -> bool:
        """Whether a name is to be taken, be it to say that what is there is in the way."""
        if _key(target) in self._taken or _key(target) in self._sources or provenance.read(target):
            return False
        return not listed or self._is_vacant(target) or (self._force and target.is_file())

    def _is_vacant(self, target: Path) -> bool:
        status = examine(target, OutputError)
        return status is None or (kind_of(status) == "file" and status.st_size == 0)

    def _check_target(self, source: Path, target: Path) -> None:
        """Raise OutputError where a result may not be written over what is there."""
        if self._is_vacant(target):
            return
        status = examine(target, OutputError)
        kind = kind_of(status) if status else "file"
        if _real(target) == _real(source):
            raise OutputError(f"{source}: would be overwritten by its own result; name another file with -o")
        if kind != "file":
            raise OutputError(f"{target}: is a {kind}; name another file with -o")
        if not self._force:
            raise OutputError(
                f"{target}: exists and is no result of {source}; "
                "pass --force to overwrite it, or name another file with -o"
            )

    def _folder(self, source: Path) -> Path:
        if self._one:
            return self._one.parent
        return self._place or source.parent

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


def _key(path: Path) -> str:
    """What two paths share that may be one file, also where capitals do not count."""
    return f"{_real(path.parent)}/{path.name}".casefold()
