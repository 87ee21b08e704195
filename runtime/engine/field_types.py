"""Types for the fields of moesr's file formats: numbers with their ranges and strings with their forms."""

from __future__ import annotations

from typing import Annotated

from moesr.runtime.system.json_dataclass import Form, Range

MAX_SIDE, MAX_COUNT, MAX_BYTES = 1 << 16, 10**9, 1 << 40

Side = Annotated[int, Range(1, MAX_SIDE)]
"""A side in pixels, or a number of channels."""

Count = Annotated[int, Range(1, MAX_COUNT)]
"""A count of at least one."""

Index = Annotated[int, Range(0, MAX_COUNT)]
"""A position, or a count that may be 0."""

Bytes = Annotated[int, Range(0, MAX_BYTES)]
"""A size or an offset in bytes."""

Error = Annotated[float, Range(0, 1e30)]
"""An error measure, which is never negative."""

Fraction = Annotated[float, Range(0, 1)]
"""A share from 0 to 1."""

Text = Annotated[str, Form(r"[^\x00-\x1f\x7f]{0,1000}", "at most 1000 characters without control characters")]
"""Text that is shown to the user on one line."""

Sha256 = Annotated[str, Form("[0-9a-f]{64}", "a SHA-256 in hexadecimal")]
"""The hash of a file."""

FileName = Annotated[
    str, Form(r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,255}", "a plain file name inside the engine directory")
]
"""A file of the engine directory itself, not of a directory below it."""

RelativePath = Annotated[
    str,
    Form(
        r"(?!(.*/)?\.{1,2}(/|$))[^/\\\x00-\x1f]+(/[^/\\\x00-\x1f]+)*", "a path below the directory of kernels"
    ),
]
"""A file below a directory, with `/` between its parts."""

Precision = Annotated[str, Form("fp32|fp16|bf16|int8", "one of fp32, fp16, bf16, int8")]
"""The arithmetic precision of a graph."""

Dimension = Side | Annotated[str, Form("B", "B")]
"""A dimension of a tensor: a number, or `graph_spec.BATCH`."""
