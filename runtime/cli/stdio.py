"""Images through pipes: standard input as an input file, and standard output as a result.

Both are stored in a temporary directory, because the type of an image is read from its content and a result
is written only when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime.errors import InputError, OutputError, UsageError
from moesr.runtime.system.files import reason

INPUT_NAME, OUTPUT_NAME = "stdin", "stdout"

_DESCRIPTOR = re.compile(r"/dev/fd/(\d+)|/proc/self/fd/(\d+)")


@dataclass(frozen=True)
class Piped:
    """The paths of a run after its pipes were replaced by files."""

    inputs: list[Path]
    output: str | None
    result: Path | None = None  # the file whose content is sent to standard output

    def send(self) -> None:
        """Write the result to standard output; OutputError if its reader has closed it."""
        if self.result is None or not self.result.exists():
            return
        try:
            sys.stdout.flush()
            with self.result.open("rb") as stream:
                shutil.copyfileobj(stream, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        except (OSError, ValueError) as error:
            raise OutputError(f"standard output: cannot be written to: {reason(error)}") from error


def descriptor_of(path: Path) -> int | None:
    """Return the number of the open file that a path such as "-", "/dev/stdin" or "/dev/fd/3" stands for."""
    names = {"-": 0, "/dev/stdin": 0, "/dev/stdout": 1}
    found = _DESCRIPTOR.fullmatch(str(path))
    return int(found[1] or found[2]) if found else names.get(str(path))


@contextlib.contextmanager
def piped(inputs: Sequence[Path], output: str | None, extension: str) -> Iterator[Piped]:
    """Replace standard input and output among the paths of a run by files, during a `with` block.

    Without `output`, the result of standard input goes to standard output. Raises UsageError for several
    results on one standard output, a result for a terminal, or standard input beside other inputs, and
    InputError if standard input is empty or cannot be read.
    """
    numbers = [descriptor_of(path) for path in inputs]
    reads = any(number is not None for number in numbers)
    if reads and output is None:
        output = "-"
    writes = (output is not None and descriptor_of(Path(output)) == 1) or output == "-"
    if not reads and not writes:
        yield Piped(list(inputs), output)
        return
    if len(inputs) > 1:
        what = "standard input" if reads else "standard output"
        raise UsageError(f"{what} can serve one image only, but there are {len(inputs)} inputs")
    if writes and sys.stdout.isatty():
        raise UsageError("an image cannot be written to a terminal; name a file with -o, or use a pipe")
    with tempfile.TemporaryDirectory(prefix="moesr-") as folder:
        result = Path(folder) / f"{OUTPUT_NAME}{extension}" if writes else None
        if numbers[0] is not None:
            inputs = [_spool(numbers[0], Path(folder) / INPUT_NAME)]
        elif inputs[0].is_dir():
            raise UsageError(f"{inputs[0]}: a directory has several results, which cannot all go to -o -")
        yield Piped(list(inputs), str(result) if result else output, result)


def _spool(number: int, place: Path) -> Path:
    """Copy what can be read from an open file to `place`."""
    try:
        with os.fdopen(os.dup(number), "rb") as source, place.open("wb") as target:
            shutil.copyfileobj(source, target)
    except OSError as error:
        raise InputError(f"standard input: cannot be read: {reason(error)}") from error
    if not place.stat().st_size:
        raise InputError("standard input: is empty (0 bytes), expected an image")
    return place
