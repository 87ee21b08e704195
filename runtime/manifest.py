"""The engine directory's `manifest.json`: written by the export, read by the runtime, defined once here.

An engine directory holds `manifest.json` and the ONNX graphs that it lists by role: `expert_0` and further
ones, which predict what a sampler needs, at most one `decoder`, and an `encoder` where the condition is a
latent. The manifest says how to drive the graphs (scale, tile, schedule, the experts' timesteps) and proves
them (SHA-256, parity with the network). `docs/engine-format.md` describes it entry by entry.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from moesr.runtime import manifest_v1, onnx_files
from moesr.runtime.contract import DECODER, DEEP, ENCODER, boundary_of, deep_of, mismatches
from moesr.runtime.errors import EngineError
from moesr.runtime.framing import Framing
from moesr.runtime.graphs import Boundary, Expert, File, Graph, TensorSpec
from moesr.runtime.hashes import sha256_of
from moesr.runtime.options import MAX_GUIDANCE
from moesr.runtime.parts import SUFFIX, read_parts
from moesr.runtime.records import build
from moesr.runtime.samplers import ETA, Prediction
from moesr.runtime.schedule import Schedule

SCHEMA = 2
MANIFEST_NAME = "manifest.json"
SAMPLERS = tuple(ETA)
CURE = "export the engine again with moesr-export, or copy the whole directory again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime needs to know about an engine. Unknown entries of the JSON file are ignored."""

    schema: int = SCHEMA
    name: str
    model: dict[str, Any]  # configuration of the networks, for the reader
    scale: int  # output pixels per input pixel, along one side
    tile: int  # output pixels of one tile, along one side
    latent_channels: int
    latent_factor: int  # output pixels per latent pixel, along one side
    latent_scale: float = 1.0  # of the autoencoder's latents inside the graphs, for the reader
    condition: Literal["image", "latent"] = (
        "image"  # the LR image on the latent grid, or the encoder's latent
    )
    init: Literal["noise", "latent"] = "noise"  # sampling starts from noise, or from the noised condition
    prediction: Prediction = "eps"
    prompts: tuple[str, ...] = ()  # that the experts know: one to follow, one to guide away from
    guidance: float = 1.0  # default strength of classifier-free guidance; 1 is none
    fidelity: float = 1.0  # default weight of the LR features in the decoder
    framing: Framing = field(default_factory=Framing)
    graphs: dict[str, Graph]  # by role
    experts: tuple[Expert, ...]  # ascending in t: the lowest noise first
    schedule: Schedule
    sampler: str  # default sampler, one of SAMPLERS
    steps: int  # default number of sampling steps
    versions: dict[str, str]  # of the packages that made the engine
    checkpoint_sha256: str

    @property
    def latent_tile(self) -> int:
        """Side of a tile in latent pixels."""
        return self.tile // self.latent_factor

    @property
    def expert_ranges(self) -> tuple[tuple[int, int], ...]:
        """(t_from, t_to) of every expert."""
        return tuple((e.t_from, e.t_to) for e in self.experts)

    @property
    def precision(self) -> str:
        """Precision of the experts, by which an engine is called."""
        return self.graphs[self.experts[0].graph].precision

    @property
    def boundaries(self) -> dict[str, Boundary]:
        """What the runtime can feed to each graph, and takes from it, by role."""
        sizes = self.tile, self.latent_channels, self.latent_factor, self.prediction
        latent = self.condition == "latent"
        options = {"with_latent": latent, "with_prompt": self.guided}
        offered = {role: boundary_of(role, *sizes, **options) for role in self.graphs}
        for expert in self.experts:
            deep = deep_of(self.graphs[expert.graph]) if expert.shallow else None
            if expert.shallow and deep:
                full, shallow = offered[expert.graph], offered[expert.shallow]
                offered[expert.graph] = replace(full, outputs=(*full.outputs, deep))
                offered[expert.shallow] = replace(shallow, inputs=(*shallow.inputs, deep))
        return offered

    @property
    def deep(self) -> TensorSpec | None:
        """The features that experts leave to their shallow graphs; None where there are none to reuse."""
        every = all(expert.shallow for expert in self.experts)
        return deep_of(self.graphs[self.experts[0].graph]) if every else None

    @property
    def guided(self) -> bool:
        """Whether there is a negative prompt, so that guidance may be other than 1."""
        return len(self.prompts) == 2

    @property
    def files(self) -> tuple[File, ...]:
        """Every file that the manifest lists."""
        listed = (f for g in self.graphs.values() for a in g.arrangements for f in a.files)
        return tuple(dict.fromkeys(listed))

    def write(self, directory: Path) -> Path:
        """Write `manifest.json` into an existing directory, checked as on reading, and return its path."""
        path = Path(directory) / MANIFEST_NAME
        _check_values(self, path)
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"
        path.write_text(text, encoding="utf-8")
        return path

    @classmethod
    def read(cls, directory: Path, verify: bool = True, *, anew: bool = False) -> Manifest:
        """Read and check an engine directory; `verify` also compares every file's SHA-256.

        That of a large file is remembered while the file is not touched, unless it is to be found `anew`.
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
        try:
            if schema == 1:
                values = manifest_v1.upgraded(values)
            manifest = build(cls, values)
        except ValueError as error:
            raise EngineError(f"{path}: {error}; {CURE}") from error
        _check_values(manifest, path)
        _check_files(manifest, directory, verify, anew)
        return manifest


def _load_json(directory: Path, path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise EngineError(_no_manifest(directory)) from None
    except UnicodeDecodeError as error:
        raise EngineError(f"{path}: not valid JSON ({error}); {CURE}") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise EngineError(
            f"{path}: cannot be read ({reason}); check the name and the permissions of the engine directory"
        ) from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path}: not valid JSON ({error}); {CURE}") from error
    if not isinstance(values, dict):
        raise EngineError(f"{path}: expected a JSON object, got {type(values).__name__}; {CURE}")
    return values


def _no_manifest(directory: Path) -> str:
    """Why a directory has no readable manifest, and what to do."""
    if directory.is_dir():
        return (
            f"{directory}: not an engine directory, it has no {MANIFEST_NAME}; "
            "make one with moesr-export -o DIR"
        )
    if directory.exists():
        return (
            f"{directory}: an engine is a directory with {MANIFEST_NAME}, this is a file; name its directory"
        )
    return f"{directory}: no such engine directory; make one with moesr-export -o {directory}"


def _check_files(manifest: Manifest, directory: Path, verify: bool, anew: bool) -> None:
    """Compare what is there with what the manifest lists; weights that it does not list are refused."""
    for file in manifest.files:
        _check_file(directory / file.file, file.sha256, verify, anew)
    for graph in manifest.graphs.values():
        for arrangement in graph.arrangements:
            listed = {file.file for file in arrangement.data}
            if verify and (stray := _taken(directory / arrangement.file) - listed):
                raise EngineError(
                    f"{directory / arrangement.file}: takes weights from {', '.join(sorted(stray))}, which "
                    f"{MANIFEST_NAME} does not list; {CURE}"
                )


def _taken(path: Path) -> set[str]:
    """Files, besides itself, that a graph is made of."""
    return read_parts(path).files if path.name.endswith(SUFFIX) else onnx_files.external_files(path)


def _check_file(path: Path, sha256: str, verify: bool, anew: bool) -> None:
    try:
        if not path.is_file():
            raise EngineError(f"{path}: missing, though {MANIFEST_NAME} lists it; {CURE}")
        got = sha256_of(path, anew=anew) if verify else sha256
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
    if m.framing.overlap is not None and not problems and not 0 <= m.framing.overlap < m.latent_tile:
        problems.append(
            f"framing.overlap is {m.framing.overlap}, expected 0 to {m.latent_tile - 1} latent pixels"
        )
    if m.model.get("scale", m.scale) != m.scale:
        problems.append(f"scale is {m.scale}, the model's is {m.model['scale']}")
    if not 1 <= m.steps <= m.schedule.timesteps:
        problems.append(f"steps is {m.steps}, expected 1 to {m.schedule.timesteps}")
    if m.sampler not in SAMPLERS:
        problems.append(f"sampler is {m.sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if not 0.0 <= m.fidelity <= 1.0:
        problems.append(f"fidelity is {m.fidelity}, expected 0 to 1")
    problems += _unguided(m)
    problems += [
        f"graph file {file.file!r} must be a plain file name inside the engine directory"
        for file in m.files
        if not file.file or Path(file.file).name != file.file or "\\" in file.file
    ]
    problems = problems or _missing_roles(m) + _gaps(m) or mismatches(m.graphs, m.boundaries)
    if problems:
        raise EngineError(f"{path}: {'; '.join(problems)}; {CURE}")


def _missing_roles(m: Manifest) -> list[str]:
    """Roles that the model needs and no graph fills, in words."""
    needed = {e.graph for e in m.experts} | {e.shallow for e in m.experts if e.shallow}
    needed |= {ENCODER} if m.condition == "latent" else set()
    missing = [f"no graph {role!r}" for role in sorted(needed - m.graphs.keys())]
    if DECODER not in m.graphs and (m.latent_channels, m.latent_factor) != (3, 1):
        missing.append("without a decoder, latents must be images: latent_channels 3, latent_factor 1")
    if m.init == "latent" and m.condition != "latent":
        missing.append("init is 'latent', which needs condition 'latent'")
    return missing or _unshared(m)


def _unshared(m: Manifest) -> list[str]:
    """Where a shallow graph has no features to take, in words."""
    deep = {e.graph: deep_of(m.graphs[e.graph]) for e in m.experts if e.shallow}
    missing = [
        f"{role} has a shallow graph and no output {DEEP!r}" for role, spec in deep.items() if not spec
    ]
    if deep and len(deep) < len(m.experts):
        missing.append("some experts have a shallow graph and some have none")
    if len(set(deep.values())) > 1:
        missing.append(f"experts differ in their output {DEEP!r}")
    return missing


def _unguided(m: Manifest) -> list[str]:
    """Where guidance lacks what it needs, in words."""
    if len(m.prompts) > 2:
        return [f"prompts has {len(m.prompts)} entries, expected at most one to follow and a negative one"]
    if not 0.0 <= m.guidance <= MAX_GUIDANCE:
        return [f"guidance is {m.guidance}, expected 0 to {MAX_GUIDANCE}"]
    if not m.guided:
        return [f"guidance is {m.guidance} without a negative prompt"] if m.guidance != 1.0 else []
    graphs = {e.graph: m.graphs.get(e.graph) for e in m.experts}
    return [
        f"{role} takes no prompt, though there are two"
        for role, graph in graphs.items()
        if graph and "prompt" not in {spec.name for spec in graph.inputs if spec.per_tile}
    ]


def _gaps(m: Manifest) -> list[str]:
    """Where the experts do not follow one another from 0 to `timesteps`, in words."""
    found, edge = [], 0
    for expert in m.experts:
        if expert.t_from != edge or expert.t_to <= expert.t_from:
            found.append(
                f"{expert.graph} serves t {expert.t_from} to {expert.t_to}, expected to start at {edge}"
            )
        edge = expert.t_to
    if edge != m.schedule.timesteps:
        found.append(f"the experts serve t up to {edge}, expected {m.schedule.timesteps}")
    return found
