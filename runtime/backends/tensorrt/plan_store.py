"""Finding, reading and writing TensorRT plans on disk.

A plan is a directory `KEY` of `tensorrt/` in the engine directory or in the user's cache. It holds
`graph.plan`, and `plan.json` with all that the plan depends on, from which the key is derived.
`docs/plan-format.schema.json` describes `plan.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moesr.runtime.backends.tensorrt.library import FLAVOURS, Library
from moesr.runtime.backends.tensorrt.plan_builder import as_text
from moesr.runtime.engine.field_types import FileName, Sha256
from moesr.runtime.engine.graph_spec import File
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.onnx_external_data import external_files
from moesr.runtime.engine.partitioned_graph import SUFFIX, read_parts
from moesr.runtime.errors import EngineError, OutputError
from moesr.runtime.options import MAX_BATCH
from moesr.runtime.system import files, json_dataclass
from moesr.runtime.system.files import sha256_of
from moesr.runtime.system.json_dataclass import Form, Range, read_bytes, read_json

PLANS_FOLDER, PLAN_NAME, RECORD_NAME = "tensorrt", "graph.plan", "plan.json"

MAX_RECORD_BYTES, MAX_PLAN_BYTES = 1 << 16, 16 << 30
"""Larger files are not read: the limits in bytes for plan.json and graph.plan."""

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on."""

    graph_sha256: Sha256
    flavour: Annotated[str, Form("|".join(FLAVOURS), f"one of {', '.join(FLAVOURS)}")]
    version: Annotated[str, Form(r"[\w.+\-]{1,64}", "a version")]
    capability: Annotated[int, Range(10, 999)]  # 89 for 8.9
    max_batch: Annotated[int, Range(1, MAX_BATCH)]

    @property
    def name(self) -> str:
        """The name of the plan's directory."""
        made_by = f"{self.flavour}-{self.version}"
        return f"{self.graph_sha256[:12]}-{made_by}-sm{self.capability}-b{self.max_batch}"

    def __str__(self) -> str:
        made_by = f"{self.flavour} {self.version}"
        return f"{made_by}, compute capability {as_text(self.capability)}, up to {self.max_batch} tiles"


@dataclass(frozen=True)
class PlanRecord(PlanKey):
    """The content of plan.json: the key, the ONNX file, and the hash of the plan."""

    file: FileName
    plan_sha256: Sha256


def key_of(library: Library, graph_sha256: str, capability: int, max_batch: int) -> PlanKey:
    """Return the key of the plan that this library builds from a graph."""
    return PlanKey(graph_sha256, library.flavour, library.version, capability, max_batch)


def graph_files(directory: Path, manifest: Manifest) -> Iterator[File]:
    """Yield the ONNX files of an engine that TensorRT runs, parts included, with their `identity`."""
    for graph in manifest.graphs.values():
        arrangement = graph.arrangement("parts")
        if arrangement.file.endswith(SUFFIX):
            steps = read_parts(directory / arrangement.file).steps
            yield from (File(step.plan.file, step.plan.sha256) for step in steps if step.plan)
        else:
            yield File(arrangement.file, identity(directory / arrangement.file, arrangement.sha256))


def identity(path: Path, sha256: str | None = None) -> str:
    """Return the hash that identifies the plans of an ONNX file; it covers the external weights, if any."""
    own = sha256 or sha256_of(path)
    beside = sorted(external_files(path))
    if not beside:
        return own
    hashes = [own, *(sha256_of(path.parent / name) for name in beside)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def timings(cache: Path | None, key: PlanKey) -> Path | None:
    """Return the path of the file with the timings of earlier builds on this kind of GPU."""
    return cache / f"{key.flavour}-{key.version}-sm{key.capability}.timings" if cache else None


def compiled(cache: Path | None, key: PlanKey) -> Path | None:
    """Return the path of the file with the kernels that the library compiles when a plan first runs."""
    return cache / "compiled" / f"{key.name}.bin" if cache else None


def plan_folders(engine: Path, cache: Path | None) -> list[Path]:
    """Return the folders that may hold plans of an engine, in the order of the search."""
    return [engine / PLANS_FOLDER, *([cache / PLANS_FOLDER] if cache else [])]


def read_plan(key: PlanKey, folders: Sequence[Path]) -> bytes | None:
    """Return the plan for a key, or None; a damaged plan is logged and skipped."""
    for folder in folders:
        directory = folder / key.name
        if not directory.is_dir():
            continue
        try:
            return _read(directory, key)
        except (OSError, ValueError) as error:
            log.warning("%s: not used: %s", directory, files.reason(error))
    return None


def _read(directory: Path, key: PlanKey) -> bytes:
    record = json_dataclass.build(PlanRecord, read_json(directory / RECORD_NAME, MAX_RECORD_BYTES))
    data = read_bytes(directory / PLAN_NAME, MAX_PLAN_BYTES)
    if any(getattr(record, field.name) != getattr(key, field.name) for field in dataclasses.fields(key)):
        raise ValueError(f"{RECORD_NAME} describes another plan")
    if hashlib.sha256(data).hexdigest() != record.plan_sha256:
        raise ValueError(f"{PLAN_NAME} does not match its recorded hash")
    return data


def misfits(key: PlanKey, folders: Sequence[Path]) -> list[str]:
    """Return messages about plans of the same graph for another library, GPU or batch size."""
    found = []
    for folder in folders:
        for record in list_plans(folder):
            if record.graph_sha256 == key.graph_sha256 and record.name != key.name:
                found.append(f"{folder / record.name}: does not fit: it is for {record}, but {key} is needed")
    return found


def list_plans(folder: Path) -> list[PlanRecord]:
    """Return the records of the plans in a folder; unreadable ones are skipped."""
    found = []
    for path in sorted(folder.glob(f"*/{RECORD_NAME}")):
        try:
            found.append(json_dataclass.build(PlanRecord, read_json(path, MAX_RECORD_BYTES)))
        except (OSError, ValueError):
            continue
    return found


def write_plan(folder: Path, key: PlanKey, file: str, data: bytes) -> Path:
    """Write a plan into a folder, replacing a plan of the same key; OutputError if that fails."""
    record = PlanRecord(**dataclasses.asdict(key), file=file, plan_sha256=hashlib.sha256(data).hexdigest())
    directory = folder / key.name
    try:
        with files.new_directory(directory, force=True, marker=RECORD_NAME) as new:
            (new / PLAN_NAME).write_bytes(data)
            (new / RECORD_NAME).write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"{directory}: cannot write the plan: {files.reason(error)}") from error
    return directory


def unusable(directory: Path, complaint: str) -> EngineError:
    """Return the error for a plan that the library does not load."""
    return EngineError(
        f"{directory}: the plan does not load ({complaint}); remove this folder and run again, or use "
        "--backend onnxruntime"
    )
