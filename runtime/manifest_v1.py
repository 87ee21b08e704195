"""Manifests of schema 1, which listed the experts and the decoder and left their boundaries to the sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesr.runtime.graphs import BATCH, Expert, Graph, Parity, TensorSpec
from moesr.runtime.records import build


@dataclass(frozen=True)
class _File:
    file: str
    sha256: str


@dataclass(frozen=True)
class _Expert(_File):
    t_from: int
    t_to: int


@dataclass(frozen=True)
class _Manifest:
    """What schema 1 had in another form; the other entries are those of schema 2."""

    tile: int
    latent_channels: int
    latent_factor: int
    precision: str
    experts: tuple[_Expert, ...]
    decoder: _File
    params: dict[str, int]  # of one "expert" and of the "decoder"
    macs: dict[str, int]
    parity: dict[str, Parity] = field(default_factory=dict)  # by file name without suffix


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A manifest of schema 1 as the JSON values of schema 2; ValueError names what is wrong with it."""
    old = build(_Manifest, values)
    side = max(old.tile // max(old.latent_factor, 1), 1)
    latent = (BATCH, old.latent_channels, side, side)
    image = (BATCH, 3, old.tile, old.tile)
    expert = (_spec("z_t", latent), _spec("cond", (BATCH, 3, side, side)), _spec("t", (BATCH,)))
    decoder = (_spec("z", latent), _spec("lr", image), _spec("fidelity", (1,)))

    def graph(file: _File, kind: str, inputs: tuple[TensorSpec, ...], output: TensorSpec) -> Graph:
        return Graph(
            file=file.file,
            sha256=file.sha256,
            precision=old.precision,
            inputs=inputs,
            outputs=(output,),
            params=old.params.get(kind, 0),
            macs=old.macs.get(kind, 0),
            parity=old.parity.get(Path(file.file).stem),
        )

    graphs = {f"expert_{k}": graph(e, "expert", expert, _spec("eps", latent)) for k, e in enumerate(old.experts)}
    graphs["decoder"] = graph(old.decoder, "decoder", decoder, _spec("image", image))
    experts = [Expert(f"expert_{k}", e.t_from, e.t_to) for k, e in enumerate(old.experts)]
    entries = {"graphs": graphs, "experts": experts}
    return values | {"schema": 2} | {k: _plain(v) for k, v in entries.items()}


def _spec(name: str, dims: tuple[int | str, ...]) -> TensorSpec:
    return TensorSpec(name, "float32", dims)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: asdict(v) for k, v in value.items()}
    return [asdict(v) for v in value]
