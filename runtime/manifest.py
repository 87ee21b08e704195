"""The engine directory's `manifest.json`: written by the export, read by the runtime, defined once here.

An engine directory holds `manifest.json`, one ONNX graph for each sampling expert and one for the decoder.
The manifest says how to drive the graphs (scale, tile, schedule, expert ranges) and proves them (SHA-256,
parity with the network).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesr.runtime.errors import EngineError
from moesr.runtime.samplers import ETA
from moesr.runtime.schedule import Schedule

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
SAMPLERS = tuple(ETA)
CURE = "export the engine again with moesr-export, or copy the whole directory again"


@dataclass(frozen=True)
class Graph:
    """An ONNX file of the engine directory (a plain file name) and its SHA-256 in hexadecimal."""

    file: str
    sha256: str

    @property
    def name(self) -> str:
        """The file name without its suffix: the key of this graph's entry in `Manifest.parity`."""
        return Path(self.file).stem


@dataclass(frozen=True)
class Expert(Graph):
    """A sampling expert and the timesteps it serves: t_from inclusive, t_to exclusive."""

    t_from: int
    t_to: int


@dataclass(frozen=True)
class Parity:
    """Error of a graph against its network, on seeded inputs; `threshold` bounds `relative_l2`."""

    relative_l2: float
    max_abs: float
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime needs to know about an engine. Unknown entries of the JSON file are ignored."""

    schema: int = SCHEMA
    name: str
    model: dict[
        str, Any
    ]  # the configuration of the networks, for the reader; the runtime does not look inside
    scale: int  # output pixels per input pixel, along one side
    tile: int  # output pixels of one tile, along one side
    latent_channels: int
    latent_factor: int  # output pixels per latent pixel, along one side
    precision: str
    experts: tuple[Expert, ...]  # ascending in t: the lowest noise first
    decoder: Graph
    schedule: Schedule
    sampler: str  # default sampler, one of SAMPLERS
    steps: int  # default number of sampling steps
    params: dict[str, int]  # parameters of one "expert" and of the "decoder"
    macs: dict[str, int]  # multiply-accumulates of one "expert" step and of one "decoder" pass, for one tile
    versions: dict[str, str]  # of the packages that made the engine
    checkpoint_sha256: str
    parity: dict[str, Parity] = field(default_factory=dict)  # by graph name

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """All graphs of the engine: the experts, then the decoder."""
        return (*self.experts, self.decoder)

    @property
    def latent_tile(self) -> int:
        """Side of a tile in latent pixels."""
        return self.tile // self.latent_factor

    @property
    def expert_ranges(self) -> tuple[tuple[int, int], ...]:
        """(t_from, t_to) of every expert."""
        return tuple((e.t_from, e.t_to) for e in self.experts)

    def write(self, directory: Path) -> Path:
        """Write `manifest.json` into an existing directory, checked as on reading, and return its path."""
        path = Path(directory) / MANIFEST_NAME
        _check_values(self, path)
        path.write_text(
            json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        return path

    @classmethod
    def read(cls, directory: Path, verify: bool = True) -> Manifest:
        """Read and check an engine directory; `verify` also compares every graph's SHA-256.

        Raises EngineError naming the file at fault and the cure.
        """
        directory = Path(directory)
        path = directory / MANIFEST_NAME
        values = _load_json(directory, path)
        schema = values.get("schema")
        if type(schema) is not int or schema < 1:
            raise EngineError(f"{path}: schema is {schema!r}, expected {SCHEMA}; {CURE}")
        if schema > SCHEMA:
            raise EngineError(
                f"{path}: the engine has manifest schema {schema}, this moesr reads schema {SCHEMA}; "
                "upgrade moesr, or export the engine again with this version's moesr-export"
            )
        manifest = _build(cls, values, path, "")
        _check_values(manifest, path)
        for graph in manifest.graphs:
            _check_file(directory / graph.file, graph.sha256, verify)
        return manifest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks, as hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _load_json(directory: Path, path: Path) -> dict[str, Any]:
    if not directory.exists():
        raise EngineError(f"{directory}: no such engine directory; make one with moesr-export -o {directory}")
    if not directory.is_dir():
        raise EngineError(
            f"{directory}: an engine is a directory with {MANIFEST_NAME}, this is a file; name its directory"
        )
    if not path.is_file():
        raise EngineError(
            f"{directory}: not an engine directory, it has no {MANIFEST_NAME}; "
            "make one with moesr-export -o DIR"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path}: not valid JSON ({error}); {CURE}") from error
    if not isinstance(values, dict):
        raise EngineError(f"{path}: expected a JSON object, got {type(values).__name__}; {CURE}")
    return values


def _check_file(path: Path, sha256: str, verify: bool) -> None:
    if not path.is_file():
        raise EngineError(f"{path}: missing, though {MANIFEST_NAME} lists it; {CURE}")
    if not verify:
        return
    try:
        got = sha256_of(path)
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if got != sha256:
        raise EngineError(
            f"{path}: damaged or replaced: its SHA-256 is {got[:12]}.., "
            f"{MANIFEST_NAME} says {sha256[:12]}..; {CURE}"
        )


def _check_values(m: Manifest, path: Path) -> None:
    """Refuse values that parse but cannot drive a model."""
    problems = [
        f"{name} is {getattr(m, name)}, expected at least 1"
        for name in ("scale", "tile", "latent_channels", "latent_factor")
        if getattr(m, name) < 1
    ]
    if not problems and m.tile % m.latent_factor:
        problems.append(f"tile {m.tile} is not a multiple of latent_factor {m.latent_factor}")
    if not 1 <= m.steps <= m.schedule.timesteps:
        problems.append(f"steps is {m.steps}, expected 1 to {m.schedule.timesteps}")
    if m.sampler not in SAMPLERS:
        problems.append(f"sampler is {m.sampler!r}, expected one of {', '.join(SAMPLERS)}")
    for graph in m.graphs:
        if not graph.file or Path(graph.file).name != graph.file or "\\" in graph.file:
            problems.append(
                f"graph file {graph.file!r} must be a plain file name inside the engine directory"
            )
    problems.extend(_gaps(m))
    if problems:
        raise EngineError(f"{path}: {'; '.join(problems)}; {CURE}")


def _gaps(m: Manifest) -> list[str]:
    """Where the experts do not follow one another from 0 to `timesteps`, in words."""
    found, edge = [], 0
    for expert in m.experts:
        if expert.t_from != edge or expert.t_to <= expert.t_from:
            found.append(
                f"{expert.file} serves t {expert.t_from} to {expert.t_to}, expected to start at {edge}"
            )
        edge = expert.t_to
    if edge != m.schedule.timesteps:
        found.append(f"the experts serve t up to {edge}, expected {m.schedule.timesteps}")
    return found


def _build(kind: Any, value: Any, path: Path, where: str) -> Any:
    """Build a dataclass, tuple[X, ...], dict[str, X] or scalar from JSON; EngineError names the entry."""
    args = typing.get_args(kind)
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        fields = [f for f in dataclasses.fields(kind) if f.init]
        required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [f"{where}{name}" for name in required if name not in value]:
            raise EngineError(f"{path}: lacks {', '.join(missing)}; {CURE}")
        given = {f.name: value[f.name] for f in fields if f.name in value}
        built = {k: _build(hints[k], v, path, f"{where}{k}.") for k, v in given.items()}
        try:
            return kind(**built)  # type: ignore[operator]
        except ValueError as error:  # a schedule that cannot be
            raise EngineError(f"{path}: {where.rstrip('.')}: {error}; {CURE}") from error
    if origin is tuple and isinstance(value, list):
        return tuple(_build(args[0], v, path, f"{where}{i}.") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _build(args[1], v, path, f"{where}{k}.") for k, v in value.items()}
    if origin is Any:
        return value
    if origin is float and type(value) in (int, float):
        return float(value)
    if isinstance(origin, type) and type(value) is origin:
        return value
    wanted = {dict: "an object", tuple: "a list"}.get(origin, getattr(origin, "__name__", str(origin)))
    raise EngineError(f"{path}: {where.rstrip('.')} is {value!r:.80}, expected {wanted}; {CURE}")
