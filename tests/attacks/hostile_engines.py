"""Hostile engine directories: damaged manifests and graphs, each with the message that `moesr-run` must give.

All of them end with exit code 3, whatever else the command asks for, and nothing outside the directory is
read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from engines import decoder_graph

from moesr.runtime.engine.manifest_file import MANIFEST_NAME

HUGE = {"10_30": 10**30, "minus_10_30": -(10**30), "10_400": 10**400}
NOT_JSON = "not valid JSON|not a usable manifest|nested too deeply"
CURE = "export the engine again|copy the whole directory again|upgrade moesr|make one with moesr-export"


@dataclass(frozen=True)
class EngineAttack:
    """Damages a valid engine directory; `says` is a pattern of the expected message."""

    damage: Callable[[Path], object]
    says: str = CURE


def changed(**entries: Any) -> EngineAttack:
    """Return a function that changes some entries of the manifest; `a__b` is entry b of entry a."""

    def damage(directory: Path) -> None:
        path = directory / MANIFEST_NAME
        values = json.loads(path.read_text())
        for name, value in entries.items():
            *folders, last = name.split("__")
            inner = values
            for folder in folders:
                inner = inner[int(folder) if folder.isdigit() else folder]
            inner[last] = value
        path.write_text(json.dumps(values))

    return EngineAttack(damage, next(iter(entries)).split("__")[-1])


def manifest(content: str | bytes, says: str = CURE) -> EngineAttack:
    """Return a function that replaces the content of the manifest."""
    data = content.encode() if isinstance(content, str) else content
    return EngineAttack(lambda directory: (directory / MANIFEST_NAME).write_bytes(data), says)


def graph(make: Callable[[], bytes], says: str = CURE, role: str = "expert_0") -> EngineAttack:
    """Return a function that replaces the file of a graph and updates its hash in the manifest."""

    def damage(directory: Path) -> None:
        content = make()
        (directory / f"{role}.onnx").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        changed(**{f"graphs__{role}__sha256": sha256}).damage(directory)

    return EngineAttack(damage, says)


def replaced(make: Callable[[Path], object], says: str = CURE, name: str = MANIFEST_NAME) -> EngineAttack:
    """Return a function that replaces a file by another kind of entry."""

    def damage(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return EngineAttack(damage, says)


def field(number: int, content: bytes) -> bytes:
    """Return a protocol buffer field that is preceded by its length."""
    length, rest = b"", len(content)
    while True:
        length += bytes([(rest & 127) | (128 if rest > 127 else 0)])
        rest >>= 7
        if not rest:
            return bytes([number << 3 | 2]) + length + content


def nested_graphs(depth: int = 2000) -> bytes:
    """Return an ONNX file whose graphs are nested: model, graph, node, attribute, graph, and so on."""
    inner = b""
    for _ in range(depth):
        inner = field(6, field(1, field(5, inner)))
    return field(7, field(1, field(5, inner)))


def outside_weights(location: str) -> bytes:
    """Return a decoder whose constants refer to another file."""
    model = decoder_graph(64)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model.SerializeToString()


def edited(change: Callable[[onnx.ModelProto], object]) -> bytes:
    """Return a decoder with one part of it changed."""
    model = decoder_graph(64)
    change(model)
    return model.SerializeToString()


MANIFESTS = {
    "empty": manifest("", NOT_JSON),
    "text": manifest("hello", NOT_JSON),
    "not_utf8": manifest(b"\xff\xfe{}", NOT_JSON),
    "list": manifest("[1, 2]", "expected a JSON object"),
    "null": manifest("null", "expected a JSON object"),
    "nested_lists": manifest("[" * 200_000, NOT_JSON),
    "nested_objects": manifest('{"a":' * 200_000, NOT_JSON),
    "no_entries": manifest("{}", "schema is None"),
    "schema_text": changed(schema="2"),
    "schema_true": changed(schema=True),
    "schema_later": changed(schema=99),
    "fifo": replaced(os.mkfifo, "not a regular file|cannot be read|is a pipe"),
    "device": replaced(lambda path: path.symlink_to("/dev/zero"), "not a regular file|cannot be read"),
    "link_to_itself": replaced(lambda path: path.symlink_to(path), "cannot be read"),
    "directory": replaced(lambda path: path.mkdir(), "cannot be read|not a regular file"),
    "timesteps_10_9": EngineAttack(
        changed(schedule__timesteps=10**9, experts__3__t_to=10**9).damage, "timesteps|t_to"
    ),
    "macs_negative": changed(graphs__expert_0__macs=-1),
    "params_negative": changed(graphs__expert_0__params=-1),
    "beta_nan": changed(schedule__beta_start=math.nan),
    "beta_infinite": changed(schedule__beta_end=math.inf),
    "fidelity_2": changed(fidelity=2.0),
    "fidelity_nan": changed(fidelity=math.nan),
    "fidelity_true": changed(fidelity=True),
    "guidance_unprompted": changed(guidance=7.0),
    "scale_0": changed(scale=0),
    "scale_10_6": changed(scale=10**6),
    "tile_0": changed(tile=0),
    "tile_odd": changed(tile=63),
    "steps_0": changed(steps=0),
    "sampler_unknown": changed(sampler="euler"),
    "no_experts": changed(experts=[]),
    "experts_overlap": EngineAttack(changed(experts__1__t_from=0).damage, "expected to start at 250"),
    "expert_unknown": EngineAttack(changed(experts__0__graph="nobody").damage, "no graph 'nobody'"),
    "overlap_whole_tile": changed(framing__overlap=16),
    "tiling_unknown": changed(framing__tiling="spiral"),
    "precision_empty": changed(graphs__expert_0__precision=""),
    "input_unknown": EngineAttack(
        changed(graphs__expert_0__inputs__0__name="secret").damage, "expert_0.*expected"
    ),
    "hash_wrong": EngineAttack(
        changed(graphs__expert_0__sha256="0" * 64).damage, "damaged or replaced: its SHA-256"
    ),
    "file_absent": EngineAttack(
        changed(graphs__expert_0__file="x.onnx").damage, "missing, though manifest.json lists it"
    ),
    **{
        f"{name}_{label}": changed(**{path: value})
        for name, path in (
            ("fidelity", "fidelity"),
            ("beta", "schedule__beta_start"),
            ("timesteps", "schedule__timesteps"),
            ("macs", "graphs__decoder__macs"),
            ("tile", "tile"),
        )
        for label, value in HUGE.items()
    },
    **{
        f"path_{index}": EngineAttack(changed(graphs__expert_0__file=path).damage, "plain file name")
        for index, path in enumerate(("../engine/expert_0.onnx", "/etc/passwd", "a/b.onnx", "..\\x", "", "."))
    },
}

GRAPHS = {
    "empty": graph(lambda: b"", "not an ONNX file"),
    "text": graph(lambda: b"hello, this is not a graph", "not an ONNX file|cannot run it"),
    "zeros": graph(lambda: bytes(1000), "not an ONNX file|cannot run it"),
    "truncated": graph(
        lambda: decoder_graph(64).SerializeToString()[:-100], "not an ONNX file|cannot run it"
    ),
    "another_role": graph(lambda: decoder_graph(64).SerializeToString(), "expected z_t"),
    "nested_2000": graph(nested_graphs, "nested|not an ONNX file"),
    "length_beyond_the_file": graph(lambda: b"\x3a\xff\xff\xff\xff\x0f" + bytes(9), "not an ONNX file"),
    "endless_number": graph(lambda: b"\x08" + b"\xff" * 99, "not an ONNX file"),
    "weights_outside": graph(
        lambda: outside_weights("../../secret"), "takes weights from ../../secret", "decoder"
    ),
    "weights_absolute": graph(
        lambda: outside_weights("/etc/passwd"), "takes weights from /etc/passwd", "decoder"
    ),
    "operator_unknown": graph(
        lambda: edited(lambda m: setattr(m.graph.node[0], "op_type", "Explode")), "cannot run it", "decoder"
    ),
    "opset_999": graph(
        lambda: edited(lambda m: setattr(m.opset_import[0], "version", 999)), "cannot run it", "decoder"
    ),
    "no_output": graph(
        lambda: edited(lambda m: m.graph.ClearField("output")), "cannot run it|expected", "decoder"
    ),
    "fifo": replaced(os.mkfifo, "missing|is a pipe|not a regular file", "expert_0.onnx"),
    "directory": replaced(lambda path: path.mkdir(), "missing|is a directory", "expert_0.onnx"),
    "link_outside": replaced(
        lambda path: path.symlink_to("/etc/passwd"), "damaged or replaced", "expert_0.onnx"
    ),
}

JSON_TEXTS = {
    "empty": "",
    "text": "hello",
    "null": "null",
    "number": "7",
    "list": "[]",
    "object": "{}",
    "nested": "[" * 200_000,
    "nested_object": '{"a":' * 200_000,
    "schema_later": '{"schema": 99}',
    "digits": '{"schema": ' + "9" * 5000 + "}",
    "schema_nan": '{"schema": NaN}',
    "schema_text": '{"schema": "2"}',
    "entries_of_other_types": '{"schema": 2, "kernels": 3, "plans": "x", "steps": {}, "values": []}',
}
"""Contents of kernels.json, parts.json and plan.json that must be refused."""
