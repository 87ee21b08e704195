"""Where TensorRT plans lie, what each is for, and which of them fits.

A plan is a directory `KEY` of `tensorrt/` in the engine directory, or of the user's cache. It holds
`graph.plan` and `plan.json`, which says all that the plan depends on; the key is made of the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesr.runtime.backends.tensorrt.library import Library
from moesr.runtime.backends.tensorrt.plan_builder import as_text
from moesr.runtime.engine.graph_spec import File
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.onnx_external_data import external_files
from moesr.runtime.engine.partitioned_graph import SUFFIX, read_parts
from moesr.runtime.errors import EngineError, OutputError
from moesr.runtime.system import files, json_dataclass
from moesr.runtime.system.files import sha256_of

PLANS_FOLDER, PLAN_NAME, RECORD_NAME = "tensorrt", "graph.plan", "plan.json"

log = logging.getLogger("moesr")


@dataclass(frozen=True)
class PlanKey:
    """All that a plan depends on."""

    graph_sha256: str
    flavour: str
    version: str
    capability: int  # 89 for 8.9
    max_batch: int

    @property
    def name(self) -> str:
        """Name of the plan's directory."""
        made_by = f"{self.flavour}-{self.version}"
        return f"{self.graph_sha256[:12]}-{made_by}-sm{self.capability}-b{self.max_batch}"

    def __str__(self) -> str:
        made_by = f"{self.flavour} {self.version}"
        return f"{made_by}, compute capability {as_text(self.capability)}, up to {self.max_batch} tiles"


@dataclass(frozen=True)
class PlanRecord(PlanKey):
    """What plan.json holds: the key, the ONNX file that it was made of, and the plan's own hash."""

    file: str
    plan_sha256: str


def key_of(library: Library, graph_sha256: str, capability: int, max_batch: int) -> PlanKey:
    """The key of a plan that this library makes."""
    return PlanKey(graph_sha256, library.flavour, library.version, capability, max_batch)


def graph_files(directory: Path, manifest: Manifest) -> Iterator[File]:
    """The ONNX files of an engine that TensorRT runs, every graph's or its parts', with their `identity`."""
    for graph in manifest.graphs.values():
        arrangement = graph.arrangement("parts")
        if arrangement.file.endswith(SUFFIX):
            steps = read_parts(directory / arrangement.file).steps
            yield from (File(step.plan.file, step.plan.sha256) for step in steps if step.plan)
        else:
            yield File(arrangement.file, identity(directory / arrangement.file, arrangement.sha256))


def identity(path: Path, sha256: str | None = None) -> str:
    """The hash that plans of an ONNX file go by: its own, or one over those of weights beside it, too."""
    own = sha256 or sha256_of(path)
    beside = sorted(external_files(path))
    if not beside:
        return own
    hashes = [own, *(sha256_of(path.parent / name) for name in beside)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def timings(cache: Path | None, key: PlanKey) -> Path | None:
    """File of what builds on this kind of GPU measured."""
    return cache / f"{key.flavour}-{key.version}-sm{key.capability}.timings" if cache else None


def compiled(cache: Path | None, key: PlanKey) -> Path | None:
    """File of the kernels that the library compiles when a plan first runs."""
    return cache / "compiled" / f"{key.name}.bin" if cache else None


def plan_folders(engine: Path, cache: Path | None) -> list[Path]:
    """Folders of plans for an engine, the first to be looked in first."""
    return [engine / PLANS_FOLDER, *([cache / PLANS_FOLDER] if cache else [])]


def read_plan(key: PlanKey, folders: Sequence[Path]) -> bytes | None:
    """A plan that fits, None where there is none; one that is damaged is logged with what is wrong."""
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
    record = json_dataclass.build(PlanRecord, json.loads((directory / RECORD_NAME).read_text()))
    data = (directory / PLAN_NAME).read_bytes()
    if any(getattr(record, field.name) != getattr(key, field.name) for field in dataclasses.fields(key)):
        raise ValueError(f"{RECORD_NAME} speaks of another plan")
    if hashlib.sha256(data).hexdigest() != record.plan_sha256:
        raise ValueError(f"{PLAN_NAME} is not what was built")
    return data


def misfits(key: PlanKey, folders: Sequence[Path]) -> list[str]:
    """In words, plans of the same graph that were made for something else."""
    found = []
    for folder in folders:
        for record in list_plans(folder):
            if record.graph_sha256 == key.graph_sha256 and record.name != key.name:
                found.append(f"{folder / record.name}: does not fit: is for {record}; needed is {key}")
    return found


def list_plans(folder: Path) -> list[PlanRecord]:
    """The plans of a folder, those that cannot be read left out."""
    found = []
    for path in sorted(folder.glob(f"*/{RECORD_NAME}")):
        try:
            found.append(json_dataclass.build(PlanRecord, json.loads(path.read_text())))
        except (OSError, ValueError):
            continue
    return found


def write_plan(folder: Path, key: PlanKey, file: str, data: bytes) -> Path:
    """Write a plan into a folder, in place of one of the same key; OutputError where that cannot be."""
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
    """The error of a plan that the library does not take."""
    return EngineError(
        f"{directory}: the plan does not load ({complaint}); remove that folder and run again, or use "
        "--backend onnxruntime"
    )
