"""Converting manifests of schema 1, which did not store the inputs and outputs of graphs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moesr.runtime.engine.field_types import Precision, Side
from moesr.runtime.engine.graph_io import DECODER, boundary_of
from moesr.runtime.engine.graph_spec import Expert, File, Graph, Parity
from moesr.runtime.system.json_dataclass import build


@dataclass(frozen=True)
class _Expert(File):
    t_from: int
    t_to: int


@dataclass(frozen=True)
class _Manifest:
    """The entries whose form differs in schema 1; all others are the same in schema 2."""

    tile: Side
    latent_channels: Side
    latent_factor: Side
    precision: Precision
    experts: tuple[_Expert, ...]
    decoder: File
    params: dict[str, int]  # one for "expert" and one for "decoder"
    macs: dict[str, int]
    parity: dict[str, Parity] = field(default_factory=dict)  # by file name without suffix


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the values of a manifest of schema 1 to schema 2; ValueError names an invalid entry."""
    old = build(_Manifest, values)
    roles = [f"expert_{k}" for k in range(len(old.experts))]

    def graph(role: str, kind: str, file: File) -> Graph:
        sizes = old.tile, old.latent_channels, old.latent_factor
        full = boundary_of(role, *sizes)
        # In schema 1 the fidelity was one value for the whole run.
        inputs = tuple(replace(i, dims=(1,)) if i.name == "fidelity" else i for i in full.inputs)
        return Graph(
            file=file.file,
            sha256=file.sha256,
            precision=old.precision,
            inputs=inputs,
            outputs=full.outputs,
            params=old.params.get(kind, 0),
            macs=old.macs.get(kind, 0),
            parity=old.parity.get(Path(file.file).stem),
        )

    graphs = {role: graph(role, "expert", e) for role, e in zip(roles, old.experts, strict=True)}
    graphs[DECODER] = graph(DECODER, "decoder", old.decoder)
    experts = [Expert(r, e.t_from, e.t_to) for r, e in zip(roles, old.experts, strict=True)]
    return values | {
        "schema": 2,
        "graphs": {role: asdict(entry) for role, entry in graphs.items()},
        "experts": [asdict(expert) for expert in experts],
    }
