"""Reading, writing and checking the `manifest.json` of an engine directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesr.runtime.engine import manifest_v1, onnx_external_data
from moesr.runtime.engine.graph_io import DECODER, DEEP, ENCODER, UNREFINED, deep_of, mismatches
from moesr.runtime.engine.hub_names import origin_of
from moesr.runtime.engine.manifest import SCHEMA, AutoencoderManifest, Manifest
from moesr.runtime.engine.partitioned_graph import SUFFIX, read_parts
from moesr.runtime.errors import EngineError
from moesr.runtime.sampling.samplers import SAMPLERS
from moesr.runtime.system.file_hashes import sha256_of
from moesr.runtime.system.json_dataclass import build, parse_json, read_json

MANIFEST_NAME = "manifest.json"

MAX_BYTES = 16 << 20
"""Larger manifests are refused; that of a full-width engine has 40 kB."""

KINDS: dict[str, tuple[type[Manifest], str, str]] = {
    "upscaler": (Manifest, "an engine for super-resolution", "moesr-run"),
    "autoencoder": (
        AutoencoderManifest,
        "an autoencoder for latents of a text-to-image model, which has no sampler",
        "moesr-decode",
    ),
}
"""Kinds of engines: the class of the manifest, a description, and the program that runs such an engine."""


def cure(directory: Path) -> str:
    """Return the cure for a damaged engine: for one of the hub, a new download."""
    if origin := origin_of(directory):
        cached = directory.absolute().parents[1]
        return f"remove {cached} and run again, or tell the owner of {origin}"
    return "export the engine again with moesr-export, or copy the whole directory again"


def write_manifest(manifest: Manifest, directory: Path) -> Path:
    """Write `manifest.json` into an existing directory and return its path.

    EngineError is raised, and nothing is written, if `read_manifest` would refuse the manifest.
    """
    path = Path(directory) / MANIFEST_NAME
    _check_values(manifest, path)
    stored = {entry.name for entry in dataclasses.fields(manifest) if entry.init}
    values = {name: value for name, value in dataclasses.asdict(manifest).items() if name in stored}
    try:
        text = json.dumps(values, indent=1, allow_nan=False) + "\n"
        build(type(manifest), parse_json(text))
    except ValueError as error:
        raise EngineError(f"{path}: {error}") from error
    path.write_text(text, encoding="utf-8")
    return path


def read_manifest(
    directory: Path, verify: bool = True, *, anew: bool = False, kinds: Sequence[str] = ("upscaler",)
) -> Manifest:
    """Read and check the manifest of an engine directory whose kind is one of `kinds` (see KINDS).

    With `verify` the SHA-256 of every file is compared. The hash of a large file is cached until the file is
    touched; `anew` computes it again. Raises an EngineError that names the damaged or missing file and the
    cure, or for an engine of another kind the program that runs it.
    """
    directory = Path(directory)
    manifest = parse_manifest(directory, kinds)
    _check_files(manifest, directory, verify, anew)
    return manifest


def parse_manifest(directory: Path, kinds: Sequence[str] = tuple(KINDS)) -> Manifest:
    """Read and check the manifest of an engine directory, whose other files may be missing.

    Its kind must be one of `kinds`. Raises an EngineError that names the wrong entry and the cure.
    """
    path = directory / MANIFEST_NAME
    values = _load_json(directory, path)
    schema = values.get("schema")
    if type(schema) is not int or schema < 1:
        raise EngineError(f"{path}: schema is {schema!r}, expected {SCHEMA}; {cure(path.parent)}")
    if schema > SCHEMA:
        raise EngineError(
            f"{path}: the engine has manifest schema {schema}, this moesr reads schema {SCHEMA}; "
            "upgrade moesr, or export the engine again with this version's moesr-export"
        )
    kind = _kind(values, directory, kinds)
    try:
        if schema == 1:
            values = manifest_v1.upgraded(values)
        manifest = build(kind, _renamed(values))
    except ValueError as error:
        raise EngineError(f"{path}: {error}; {cure(path.parent)}") from error
    _check_values(manifest, path)
    return manifest


def _kind(values: dict[str, Any], directory: Path, wanted: Sequence[str]) -> type[Manifest]:
    """Return the class of a manifest; EngineError if it is not of a kind that is wanted."""
    name = values.get("kind", "upscaler")
    if not isinstance(name, str) or name not in KINDS:
        raise EngineError(
            f"{directory / MANIFEST_NAME}: kind is {name!r:.80}, expected one of {', '.join(KINDS)}; upgrade "
            "moesr, or export the engine again with this version's moesr-export"
        )
    kind, what, program = KINDS[name]
    if name not in wanted:
        raise EngineError(f"{directory}: is {what}; use it with {program} --engine {directory}")
    return kind


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Rename `calibration.share`, as older engines call it, to `int8_fraction`."""

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if not isinstance(value, dict):
            return value
        found = {name: renamed(item) for name, item in value.items()}
        calibration = found.get("calibration")
        if isinstance(calibration, dict) and "share" in calibration:
            found["calibration"] = {"int8_fraction": calibration["share"]} | calibration
        return found

    return values | {"graphs": renamed(values.get("graphs", {}))}


def _load_json(directory: Path, path: Path) -> dict[str, Any]:
    try:
        values = read_json(path, MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise EngineError(_no_manifest(directory)) from None
    except OSError as error:
        raise EngineError(
            f"{path}: cannot be read ({error.strerror or error}); check the name and the permissions of the "
            "engine directory"
        ) from error
    except ValueError as error:
        raise EngineError(f"{path}: not a usable {MANIFEST_NAME} ({error}); {cure(path.parent)}") from error
    if not isinstance(values, dict):
        raise EngineError(f"{path}: expected a JSON object, got {type(values).__name__}; {cure(path.parent)}")
    return values


def _no_manifest(directory: Path) -> str:
    """Return the message for a directory without a readable manifest, with the cure."""
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
    """Compare the files on disk with the manifest; external weights that it does not list are refused."""
    for file in manifest.files:
        _check_file(directory / file.file, file.sha256, verify, anew)
    for graph in manifest.graphs.values():
        for arrangement in graph.arrangements:
            listed = {file.file for file in arrangement.data}
            if verify and (stray := _taken(directory / arrangement.file) - listed):
                raise EngineError(
                    f"{directory / arrangement.file}: takes weights from {', '.join(sorted(stray))}, which "
                    f"{MANIFEST_NAME} does not list; {cure(directory)}"
                )


def _taken(path: Path) -> set[str]:
    """Return the further files of a graph, which hold its external weights or its parts."""
    return read_parts(path).files if path.name.endswith(SUFFIX) else onnx_external_data.external_files(path)


def _check_file(path: Path, sha256: str, verify: bool, anew: bool) -> None:
    try:
        if not path.is_file():
            raise EngineError(f"{path}: missing, though {MANIFEST_NAME} lists it; {cure(path.parent)}")
        got = sha256_of(path, anew=anew) if verify else sha256
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if got != sha256:
        raise EngineError(
            f"{path}: damaged or replaced: its SHA-256 is {got[:12]}.., "
            f"{MANIFEST_NAME} says {sha256[:12]}..; {cure(path.parent)}"
        )


def _check_values(m: Manifest, path: Path) -> None:
    """Refuse values that can be read but with which no model can run."""
    problems: list[str] = []
    if min(m.tile, m.latent_factor) < 1 or m.tile % m.latent_factor:
        problems.append(f"tile {m.tile} is not a multiple of latent_factor {m.latent_factor}")
    elif m.framing.overlap is not None and not 0 <= m.framing.overlap < m.latent_tile:
        problems.append(
            f"framing.overlap is {m.framing.overlap}, expected 0 to {m.latent_tile - 1} latent pixels"
        )
    if m.model.get("scale", m.scale) != m.scale:
        problems.append(f"scale is {m.scale}, the model's is {m.model['scale']}")
    if not 1 <= m.steps <= m.schedule.timesteps:
        problems.append(f"steps is {m.steps}, expected 1 to {m.schedule.timesteps}")
    if m.sampler not in SAMPLERS:
        problems.append(f"sampler is {m.sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if m.preview and any(len(row) != m.latent_channels for row in m.preview.weights):
        problems.append(f"preview.weights are expected to be 3 rows of {m.latent_channels} numbers")
    problems += _unguided(m)
    if isinstance(m, AutoencoderManifest):
        problems = problems or _roles_of_autoencoder(m)
    else:
        problems = problems or _missing_roles(m) + _gaps(m)
    problems = problems or mismatches(m.graphs, m.boundaries)
    if problems:
        raise EngineError(f"{path}: {'; '.join(problems)}; {cure(path.parent)}")


def _roles_of_autoencoder(m: AutoencoderManifest) -> list[str]:
    """Return messages about graphs that an autoencoder lacks or cannot have."""
    found = [f"no graph {DECODER!r}"] if DECODER not in m.graphs else []
    others = sorted(m.graphs.keys() - {DECODER, ENCODER, UNREFINED})
    return found + [f"graph {role!r}, which an autoencoder cannot have" for role in others]


def _missing_roles(m: Manifest) -> list[str]:
    """Return messages about graphs that the model needs and the manifest lacks."""
    needed = {e.graph for e in m.experts} | {e.shallow for e in m.experts if e.shallow}
    needed |= {ENCODER} if m.condition == "latent" else set()
    missing = [f"no graph {role!r}" for role in sorted(needed - m.graphs.keys())]
    if DECODER not in m.graphs and (m.latent_channels, m.latent_factor) != (3, 1):
        missing.append("without a decoder, latents must be images: latent_channels 3, latent_factor 1")
    if m.init == "latent" and m.condition != "latent":
        missing.append("init is 'latent', which needs condition 'latent'")
    return missing or _unshared(m)


def _unshared(m: Manifest) -> list[str]:
    """Return messages about shallow graphs without the features that they need."""
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
    """Return messages about guidance without the prompts that it needs."""
    if len(m.prompts) > 2:
        return [f"prompts has {len(m.prompts)} entries, expected at most a prompt and a negative prompt"]
    if not m.guided:
        return [f"guidance is {m.guidance} without a negative prompt"] if m.guidance != 1.0 else []
    graphs = {e.graph: m.graphs.get(e.graph) for e in m.experts}
    return [
        f"{role} takes no prompt, though there are two"
        for role, graph in graphs.items()
        if graph and "prompt" not in {spec.name for spec in graph.inputs if spec.per_tile}
    ]


def _gaps(m: Manifest) -> list[str]:
    """Return messages about gaps and overlaps of the experts, which must cover 0 to `timesteps` in order."""
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
