"""Hostile weights: published files for `moesr-import` and checkpoint directories for `moesr-export`."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

MARKER = "executed"
"""A malicious pickle tries to create a file of this name when it is loaded."""


class _Command:
    """An object whose pickle is a call of os.system."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple:
        return os.system, (self._command,)


def command_pickle(path: Path) -> bytes:
    """Return a bare pickle that creates a file beside itself when it is loaded."""
    return pickle.dumps(_Command(f"touch {path.parent / MARKER}"))


def command_archive(path: Path) -> bytes:
    """Return a file in the format of torch.save whose pickle creates a file beside it when it is loaded."""
    stream = io.BytesIO()
    torch.save({"weight": torch.ones(2), "hook": _Command(f"touch {path.parent / MARKER}")}, stream)
    return stream.getvalue()


def archive(**entries: bytes) -> bytes:
    """Return a ZIP file with the entries that torch.save writes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in entries.items():
            file.writestr(f"archive/{name}", content)
    return stream.getvalue()


def safetensors(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header; `length` replaces the stored length of the header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(**values: object) -> bytes:
    """Return a header that describes one tensor."""
    return json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | values}).encode()


PUBLISHED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    # file name: (content, pattern of the expected message)
    "empty.ckpt": (lambda path: b"", "the file is empty"),
    "page.ckpt": (lambda path: b"<!DOCTYPE html><html></html>", "holds a web page"),
    "text.ckpt": (lambda path: b"hello", "not a whole PyTorch file"),
    "zeros.ckpt": (lambda path: bytes(4096), "not a whole PyTorch file"),
    "command.ckpt": (command_pickle, "could run code|--trust-pickle|not a whole PyTorch file"),
    "command_archive.ckpt": (command_archive, "could run code|--trust-pickle|not tensors"),
    "no_pickle.ckpt": (lambda path: archive(data=b"1"), "not a whole PyTorch file"),
    "deep_pickle.ckpt": (
        lambda path: archive(**{"data.pkl": b"(" * 100_000, "version": b"3"}),
        "not a whole PyTorch file",
    ),
    "huge_header.safetensors": (lambda path: safetensors(b"{}", 2**63), "not a whole safetensors file"),
    "long_header.safetensors": (lambda path: safetensors(b"{}", 10**8), "not a whole safetensors file"),
    "no_json.safetensors": (lambda path: safetensors(b"hello"), "not a whole safetensors file"),
    "nested.safetensors": (lambda path: safetensors(b"[" * 100_000), "not a whole safetensors file"),
    "outside.safetensors": (
        lambda path: safetensors(entry(w={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]})),
        "not a whole safetensors file",
    ),
    "huge_shape.safetensors": (
        lambda path: safetensors(entry(w={"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]})),
        "not a whole safetensors file",
    ),
    "backwards.safetensors": (
        lambda path: safetensors(entry(w={"dtype": "F32", "shape": [1], "data_offsets": [4, 0]})),
        "not a whole safetensors file",
    ),
    "foreign.safetensors": (
        lambda path: safetensors(entry(), data=bytes(4)),
        "unknown|missing|neither|no weights|w",
    ),
}

CONFIGS: dict[str, object] = {
    # the content of config.json, or changes to a valid one by path
    "empty": "",
    "text": "hello",
    "list": "[]",
    "nested": '{"a":' * 200_000,
    "res_blocks_2_31": {"unet.res_blocks": 2**31},
    "res_blocks_negative": {"unet.res_blocks": -1},
    "width_huge": {"unet.width": 2**40},
    "width_0": {"unet.width": 0},
    "width_text": {"unet.width": "160"},
    "width_400_digits": {"unet.width": 10**400},
    "channels_huge": {"decoder.channels": 2**40},
    "levels_many": {"unet.channel_mult": [1] * 100_000},
    "codebook_huge": {"decoder.codebook_size": 2**40},
    "experts_many": {"expert_ranges": [[k, k + 1] for k in range(100_000)]},
}
