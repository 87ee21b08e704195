"""Finding the files in which an ONNX file stores its external weights, without the onnx library.

The messages that cannot hold a tensor are skipped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moesr.runtime.engine.protobuf import BYTES, MAX_NESTING, fields
from moesr.runtime.errors import EngineError
from moesr.runtime.system.files import reason, scratch_directory, sweep

# Fields that lead to tensors, by message: field number of onnx.proto -> message inside it.
_PATHS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}


def external_files(path: Path) -> set[str]:
    """Return the locations, as written, of the external weights of an ONNX file; empty if it has none.

    Raises EngineError if the file cannot be read or is not in the format of ONNX.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return set(_locations(data, 0, len(data), "Model", MAX_NESTING))
    except (ValueError, IndexError) as error:  # an empty file cannot be mapped
        raise EngineError(
            f"{path}: not an ONNX file ({error}); export the engine again with moesr-export"
        ) from error
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({reason(error)})") from error


@contextlib.contextmanager
def regular_files(path: Path) -> Iterator[Path]:
    """Yield a path of an ONNX file beside which its external weights are regular files, for a `with` block.

    Libraries refuse weights that are links out of the directory, as in the cache of the Hugging Face hub. The
    files of such a graph are linked into a temporary directory beside the weights, or copied into one if the
    file system allows no links. Raises EngineError if the ONNX file cannot be read, and OSError.
    """
    if not any(other.is_symlink() for other in path.parent.iterdir()):
        yield path
        return
    weights = external_files(path)
    outside = [path.parent / name for name in weights if (path.parent / name).is_symlink()]
    if not outside or any(Path(name).name != name for name in weights):  # libraries refuse other names
        yield path
        return
    place = outside[0].resolve().parent
    sweep(place)
    with contextlib.ExitStack() as stack:
        try:
            scratch = stack.enter_context(scratch_directory(place))
        except OSError:  # the cache may be read-only
            scratch = stack.enter_context(scratch_directory(Path(tempfile.gettempdir())))
        for name in (path.name, *weights):
            _link((path.parent / name).resolve(), scratch / name)
        yield scratch / path.name


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _locations(data: mmap.mmap, start: int, stop: int, message: str, levels: int) -> Iterator[str]:
    """Return the locations below one message, which may contain this many levels of nested messages."""
    if not levels:
        raise ValueError(f"its messages are nested more than {MAX_NESTING} deep")
    if message == "Entry":
        entry = {number: data[a:b] for number, kind, a, b in fields(data, start, stop) if kind == BYTES}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode("utf-8", "replace")
        return
    inner = _PATHS[message]
    for number, kind, a, b in fields(data, start, stop):
        if kind == BYTES and number in inner:
            yield from _locations(data, a, b, inner[number], levels - 1)
