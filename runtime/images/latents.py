"""Reading latents of text-to-image models: `.npy`, `.safetensors`, and `.pt` without PyTorch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moesr.runtime.errors import InputError
from moesr.runtime.system import torch_file
from moesr.runtime.system.files import reason
from moesr.runtime.system.json_dataclass import parse_json

MAX_HEADER_BYTES = 1 << 24
"""Larger headers of safetensors files are refused."""

NAMES = ("latents", "latent", "samples", "sample", "z")
"""Names of the tensor that is taken from a file with several, the preferred one first."""

SAFETENSORS = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bf16"}


def read_latents(stream: BinaryIO, path: Path, channels: int) -> np.ndarray:
    """Return the latents of an opened file as float32 [B, C, h, w]; one latent [C, h, w] is a batch of one.

    A file with several tensors must call that of the latents by one of NAMES. No code from the file is run.
    Raises InputError, naming the file, if it holds no such latents or values that are not finite.
    """
    try:
        tensors = READERS[path.suffix.lower()](stream)
    except KeyError:
        raise InputError(f"{path}: is not a file of latents; expected {', '.join(READERS)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise InputError(
            f"{path}: {error}; save the latents again as a tensor [B, {channels}, h, w]"
        ) from error
    return _checked(_chosen(tensors, path), path, channels)


def _chosen(tensors: dict[str, np.ndarray], path: Path) -> np.ndarray:
    """Return the only tensor, or the one whose name says that it holds latents."""
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    for name in NAMES:
        if name in tensors:
            return tensors[name]
    if not tensors:
        raise InputError(f"{path}: holds no tensor, expected latents")
    listed = ", ".join(sorted(tensors)[:4]) + (", .." if len(tensors) > 4 else "")
    raise InputError(
        f"{path}: holds {len(tensors)} tensors ({listed}), expected one, or one called {NAMES[0]!r}"
    )


def _checked(values: np.ndarray, path: Path, channels: int) -> np.ndarray:
    """Return latents as float32 [B, C, h, w]; InputError if they are none."""
    shape = list(values.shape)
    if values.dtype.kind != "f":
        raise InputError(f"{path}: holds {values.dtype} values, expected latents of floating-point values")
    whole = values[None] if values.ndim == 3 else values
    if whole.ndim != 4 or 0 in whole.shape:
        raise InputError(
            f"{path}: holds a tensor of shape {shape}, expected latents [{channels}, h, w] or "
            f"[B, {channels}, h, w]"
        )
    if whole.shape[1] != channels:
        raise InputError(
            f"{path}: holds a tensor of shape {shape} with {whole.shape[1]} channels, the engine decodes "
            f"latents of {channels}: [{channels}, h, w] or [B, {channels}, h, w]"
        )
    with np.errstate(over="ignore"):
        whole = whole.astype(np.float32)
    if not np.isfinite(whole).all():
        raise InputError(f"{path}: holds NaN or infinite values")
    return whole


def _npy(stream: BinaryIO) -> dict[str, np.ndarray]:
    """Read an array of NumPy without pickled objects; its size is checked against the file's first."""
    start = stream.tell()
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"a file of NumPy's format {version[0]}.{version[1]}, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are not read")
    needed, position = math.prod(shape) * dtype.itemsize, stream.tell()
    stream.seek(0, 2)
    if any(side < 0 for side in shape) or stream.tell() - position < needed:
        raise ValueError("ends before its last value; the file is not whole")
    stream.seek(start)
    return {"": np.lib.format.read_array(stream, allow_pickle=False)}


def _safetensors(stream: BinaryIO) -> dict[str, np.ndarray]:
    """Read the floating-point tensors of a safetensors file."""
    head = stream.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER_BYTES + 1
    if length > MAX_HEADER_BYTES:
        raise ValueError("not a whole safetensors file")
    entries: Any = parse_json(stream.read(length))
    if not isinstance(entries, dict):
        raise ValueError("not a whole safetensors file")
    start = 8 + length
    stream.seek(0, 2)
    size = stream.tell() - start
    tensors = {}
    for name, entry in entries.items():
        kind = entry.get("dtype") if name != "__metadata__" and isinstance(entry, dict) else None
        if isinstance(kind, str) and kind in SAFETENSORS:
            tensors[name] = _safetensor(stream, start, size, entry)
    return tensors


def _safetensor(stream: BinaryIO, start: int, size: int, entry: dict[str, Any]) -> np.ndarray:
    """Read one tensor; `size` is the number of bytes of all tensors."""
    kind = SAFETENSORS[entry["dtype"]]
    shape: Any = entry.get("shape")
    places: Any = entry.get("data_offsets")
    whole = isinstance(shape, list) and isinstance(places, list) and len(places) == 2
    if not whole or any(type(number) is not int or number < 0 for number in (*shape, *places)):
        raise ValueError(f"its header is damaged ({json.dumps(entry)[:80]})")
    first, last = places
    width = 2 if kind == "bf16" else int(kind[1:])
    if not first <= last <= size or last - first != math.prod(shape) * width:
        raise ValueError("a tensor reaches beyond the file or has another size; the file is not whole")
    stream.seek(start + first)
    return torch_file.to_array(stream.read(last - first), kind).reshape(shape)


READERS: dict[str, Callable[[BinaryIO], dict[str, np.ndarray]]] = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".pt": torch_file.read,
    ".pth": torch_file.read,
}
"""Readers of files of latents by extension; each returns tensors by name and raises ValueError or OSError."""
