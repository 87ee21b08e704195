"""Which file each input becomes: directories opened, names chosen, nothing overwritten by accident."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime.errors import InputError, MoesrError, OutputError, UsageError
from moesr.runtime.image_io import READ_SUFFIXES, check_output


@dataclass(frozen=True)
class Task:
    """One input file: where its result goes, and why it is not to be done, if so."""

    source: Path
    target: Path
    error: MoesrError | None = None
    finished: bool = False  # an earlier run over the directory made the target


def plan(inputs: Sequence[Path], output: str | None, scale: int, force: bool) -> list[Task]:
    """One task a file, in the order given; the images of a directory in the order of their names.

    Without `output`, results go beside their inputs as `{stem}_x{scale}.png`; otherwise see `check_usage`.
    Results that exist are errors unless `force`, but for inputs from a directory they count as finished.
    """
    directory = check_usage(inputs, output)
    if output is not None and directory is None:
        return list(_tasks([(inputs[0], Path(output), False)], force))
    suffix = f"_x{scale}.png"
    found = list(_expand(inputs, suffix))
    folders = [directory or source.parent for source, _ in found]
    stems = Counter(folder / source.stem for folder, (source, _) in zip(folders, found, strict=True))
    named = []
    for folder, (source, listed) in zip(folders, found, strict=True):
        # Two images that differ in their suffix only keep it in the name.
        unique = stems[folder / source.stem] == 1
        stem = source.stem if unique else source.name.replace(".", "_")
        named.append((source, folder / (stem + suffix), listed))
    return list(_tasks(named, force))


def check_usage(inputs: Sequence[Path], output: str | None) -> Path | None:
    """The directory that `output` names, None where it names a file or nothing.

    It is a directory where it is one already, ends in a slash, or has to take the results of several inputs
    or of a directory. Raises UsageError for a file where a directory is needed, or of unknown kind.
    """
    if output is None:
        return None
    path = Path(output)
    several = len(inputs) > 1 or inputs[0].is_dir()
    if several or path.is_dir() or output.endswith(("/", os.sep)):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: is a file, expected a directory for the results")
        return path
    check_output(path)
    return None


def _expand(inputs: Iterable[Path], suffix: str) -> Iterator[tuple[Path, bool]]:
    """Files named, and the images of directories (marked True) without earlier results."""
    for path in inputs:
        if not path.is_dir():
            yield path, False
            continue
        names = sorted(p for p in path.iterdir() if p.suffix.lower() in READ_SUFFIXES and p.name[0] != ".")
        results = {p.with_name(stem + suffix) for p in names for stem in (p.stem, p.name.replace(".", "_"))}
        yield from ((p, True) for p in names if p not in results and p.is_file())


def _tasks(named: Iterable[tuple[Path, Path, bool]], force: bool) -> Iterator[Task]:
    taken: dict[Path, Path] = {}
    for source, target, listed in named:
        error: MoesrError | None = None
        finished = False
        earlier = taken.setdefault(target.resolve(), source)
        if earlier is not source:
            error = OutputError(f"{source}: its result {target} is that of {earlier} too; run them apart")
        elif not source.exists():
            error = InputError(f"{source}: no such file")
        elif target.exists() and target.samefile(source):
            error = OutputError(
                f"{source}: would be overwritten by its own result; name another file with -o"
            )
        elif target.is_dir():
            error = OutputError(f"{target}: is a directory; name another file with -o")
        elif target.exists() and not force:
            finished = listed
            error = None if listed else OutputError(f"{target}: exists; pass --force to overwrite it")
        yield Task(source, target, error, finished)
