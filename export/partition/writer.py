"""Writes a graph in parts: graphs, the kernels' weights, and `ROLE.parts.json`, which lists them all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from onnx import TensorProto, ValueInfoProto

from moesr.export.graphs.builder import BuiltGraph
from moesr.export.graphs.kernel_call import KernelCall
from moesr.export.partition.partition import Part
from moesr.runtime.engine.graph_spec import File
from moesr.runtime.engine.partitioned_graph import (
    ALIGNMENT,
    SCHEMA,
    SUFFIX,
    Constant,
    KernelStep,
    Parts,
    PartStep,
    PlanStep,
    Stored,
)

_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}


def write_parts(directory: Path, role: str, built: BuiltGraph, parts: Sequence[Part]) -> tuple[File, ...]:
    """Write all files of a partitioned graph; the first one returned is the list of parts."""
    constants, files, steps = bytearray(), [], []
    for part in parts:
        if isinstance(part, KernelCall):
            steps.append(PartStep(kernel=_kernel(part, constants)))
        else:
            number = sum(step.plan is not None for step in steps)
            file = _write(directory, f"{role}.part_{number}.onnx", part.SerializeToString(deterministic=True))
            names = [[value.name for value in side] for side in (part.graph.input, part.graph.output)]
            steps.append(PartStep(plan=PlanStep(file.file, file.sha256, *map(tuple, names))))
            files.append(file)
    if constants:
        files.append(_write(directory, f"{role}.constants.bin", bytes(constants)))
    content = Parts(
        schema=SCHEMA,
        inputs=tuple(spec.name for spec in built.boundary.inputs),
        outputs=tuple(spec.name for spec in built.boundary.outputs),
        values=_values(built, parts, steps),
        constants=files[-1].file if constants else None,
        steps=tuple(steps),
    )
    text = json.dumps(dataclasses.asdict(content), indent=1) + "\n"
    return _write(directory, f"{role}{SUFFIX}", text.encode()), *files


def _kernel(call: KernelCall, constants: bytearray) -> KernelStep:
    """Return a kernel's step. Its weights are appended to `constants`."""
    placed = {}
    for name, weight in call.packed().items():
        constants.extend(bytes(-len(constants) % ALIGNMENT))
        data = weight.view(torch.uint8).numpy().tobytes()
        placed[name] = Constant(len(constants), len(data))
        constants.extend(data)
    output, value = call.output
    return KernelStep(
        call.op, call.dtype, dict(call.shape), dict(call.inputs), {output: value}, placed, dict(call.scalars)
    )


def _values(built: BuiltGraph, parts: Sequence[Part], steps: Sequence[PartStep]) -> dict[str, Stored]:
    """Return the values between steps as the parts' graphs declare them; names may differ from `built`."""
    declared = {
        value.name: Stored(_TYPES[value.type.tensor_type.elem_type], _dims(value))
        for part in parts
        if not isinstance(part, KernelCall)
        for value in (*part.graph.input, *part.graph.output)
    }
    names = dict.fromkeys(name for step in steps for name in (*step.taken, *step.made))
    between = {name: built.values[name] for name in names if name not in declared}
    return declared | {name: Stored(_TYPES[value.dtype], value.shape) for name, value in between.items()}


def _dims(value: ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def _write(directory: Path, name: str, data: bytes) -> File:
    (directory / name).write_bytes(data)
    return File(name, hashlib.sha256(data).hexdigest())
