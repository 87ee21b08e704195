"""Writes a graph's weights into its ONNX file, or into files beside it if they are too large for one file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from onnx import TensorProto

from moesr.export.graphs.builder import BuiltGraph
from moesr.runtime.engine.graph_spec import File

INSIDE_BYTES = 1 << 30
"""The most bytes of weights inside an ONNX file; Protocol Buffers allow twice that."""

FILE_BYTES = 2_000_000_000
"""The size of a file of weights at most, unless a single tensor is larger."""

SMALL_BYTES = 1 << 10
"""Smaller tensors always stay in the ONNX file, because shape inference reads some of them."""

ALIGNMENT = 1 << 12  # so that a file can be mapped into memory


def write_graph(directory: Path, name: str, built: BuiltGraph) -> tuple[File, tuple[File, ...]]:
    """Write `name`.onnx and, for large weights, `name`.weights_0, `name`.weights_1, ...; empties `built`.

    Equal graphs give equal bytes. The ONNX file holds the hashes of the weight files. Its own hash, which
    identifies compiled plans, therefore covers the weights too.
    """
    tensors = [t for t in built.model.graph.initializer if len(t.raw_data) >= SMALL_BYTES]
    data: list[File] = []
    if sum(len(t.raw_data) for t in tensors) > INSIDE_BYTES:
        while tensors:
            data.append(_write_weights(directory / f"{name}.weights_{len(data)}", tensors))
    hashes = (onnx.StringStringEntryProto(key=file.file, value=file.sha256) for file in data)
    built.model.metadata_props.extend(hashes)
    content = built.to_bytes()
    path = directory / f"{name}.onnx"
    path.write_bytes(content)
    return File(path.name, hashlib.sha256(content).hexdigest()), tuple(data)


def _write_weights(path: Path, tensors: list[TensorProto]) -> File:
    """Move the first tensors into a new file, as many as it may hold."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as stream:
        while tensors and (size == 0 or size + len(tensors[0].raw_data) <= FILE_BYTES):
            tensor = tensors.pop(0)
            values = tensor.raw_data
            refer(tensor, path.name, size, len(values))
            for piece in (values, bytes(-len(values) % ALIGNMENT)):
                digest.update(piece)
                size += stream.write(piece)
    return File(path.name, digest.hexdigest())


def refer(tensor: TensorProto, file: str, offset: int, length: int) -> None:
    """Replace a tensor's values by a reference to a file, an offset and a length."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": file, "offset": str(offset), "length": str(length)}
    tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items())
