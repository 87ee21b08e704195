"""Reading tensors from files of `torch.save` without PyTorch and without running code from the file.

Such a file is a zip archive with a pickle and the raw storages of the tensors (PyTorch 1.6 and later). Only
tensors in dictionaries, lists and tuples are read. A pickle that names anything else is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

MAX_PICKLE_BYTES = 1 << 20
"""Larger pickles are refused; that of a single tensor has 500 bytes."""

MAX_DIMENSIONS = 8

TYPES = {
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    "bfloat16": "bf16",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint8": "u1",
}
"""NumPy's names of PyTorch's types; bfloat16 has none."""

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
}


@dataclass(frozen=True)
class _Type:
    """A type of elements, as a pickle names it."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A storage of the file: the key of its entry, and the type of its elements unless it is untyped."""

    key: str
    kind: str | None


@dataclass(frozen=True)
class _Tensor:
    """A view into a storage, in elements."""

    storage: _Storage
    kind: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(stream: BinaryIO) -> dict[str, np.ndarray]:
    """Return the tensors of a file by name; a file with a single tensor gives the name "".

    Names are the keys and positions that lead to a tensor, joined by dots. bfloat16 becomes float32. Raises
    ValueError for anything that is not such a file.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            root = _root(archive)
            found = _unpickled(archive.read(f"{root}/data.pkl"))
            order = _byte_order(archive, root)
            return {name: _array(archive, root, order, one) for name, one in _tensors(found, "")}
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise ValueError(f"not a whole file of torch.save ({type(error).__name__}: {error})") from error


def _root(archive: zipfile.ZipFile) -> str:
    """Return the folder of the archive that holds everything; ValueError if there is none."""
    found = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(found) != 1 or found[0].filename.count("/") != 1:
        raise ValueError("a zip file without the entries of torch.save")
    if found[0].file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes, expected only tensors")
    return found[0].filename.removesuffix("/data.pkl")


def _byte_order(archive: zipfile.ZipFile, root: str) -> str:
    name = f"{root}/byteorder"
    big = name in archive.namelist() and archive.read(name).strip() == b"big"
    return ">" if big else "<"


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]  # in Python: its memo is no large array
    """An unpickler that knows only what tensors need."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for; ValueError if it is not part of a tensor or container."""
        if module == "torch" and name in STORAGES:
            return _Type(STORAGES[name])
        if module == "torch" and name in TYPES:
            return _Type(name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return None
        known = _KNOWN.get((module, name))
        if known is None:
            raise ValueError(f"holds an object of the class {module}.{name}, expected only tensors")
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage."""
        kind, element, key, _, _ = pid
        if kind != "storage" or not isinstance(key, str) or not isinstance(element, _Type | None):
            raise ValueError("names a storage in an unknown way")
        return _Storage(key, element.name if element else None)


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if storage.kind is None:
        raise ValueError("holds a tensor without a type")
    return _Tensor(storage, storage.kind, offset, tuple(shape), tuple(strides))


def _typed_tensor(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, kind: _Type, *_: Any
) -> _Tensor:
    return _Tensor(storage, kind.name, offset, tuple(shape), tuple(strides))


def _parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


def _unpickled(data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data)).load()


def _tensors(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, _Tensor]]:
    """Yield the tensors inside a value with their names."""
    if isinstance(value, _Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)) and depth < 4:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _tensors(inner, f"{name}.{key}" if name else str(key), depth + 1)


def _array(archive: zipfile.ZipFile, root: str, order: str, tensor: _Tensor) -> np.ndarray:
    """Read a tensor's storage and return the view into it."""
    info = archive.getinfo(f"{root}/data/{tensor.storage.key}")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("holds a compressed storage, which torch.save does not write")
    kind = TYPES[tensor.kind]
    flat = to_array(archive.read(info), kind, order)
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if (
        len(tensor.shape) != len(tensor.strides)
        or len(tensor.shape) > MAX_DIMENSIONS
        or any(type(number) is not int or number < 0 for number in numbers)
        or math.prod(tensor.shape) > len(flat)
    ):
        raise ValueError("holds a tensor of impossible shape")
    if 0 in tensor.shape:
        return np.empty(tensor.shape, flat.dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if last >= len(flat):
        raise ValueError("holds a tensor that reaches beyond its storage; the file is not whole")
    steps = tuple(step * flat.itemsize for step in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False).copy()


def to_array(data: bytes, kind: str, order: str = "<") -> np.ndarray:
    """Return the elements of a buffer, of a type as in TYPES; bfloat16 becomes float32."""
    if kind != "bf16":
        size = np.dtype(kind).itemsize
        return np.frombuffer(data, np.dtype(order + kind), len(data) // size).astype(kind)
    halves = np.frombuffer(data, np.dtype(order + "u2"), len(data) // 2)
    return (halves.astype(np.uint32) << 16).view(np.float32)
