"""Engine directories: what is written is read back, and every kind of damage is named with its cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from engines import build_engine

from moesr.runtime.errors import EngineError
from moesr.runtime.manifest import Graph, Manifest, sha256_of


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return build_engine(tmp_path / "engine")


def _edit(engine: Path, change: Callable[[dict], object]) -> None:
    path = engine / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_round_trip(engine: Path, tmp_path: Path):
    manifest = Manifest.read(engine)
    copy = build_engine(tmp_path / "copy")
    changed = replace(manifest, model={"unet": {"channel_mult": [1, 2]}}, sampler="ddim", steps=7)
    changed.write(copy)
    assert Manifest.read(copy) == changed
    assert changed != manifest


def test_derived_sizes(engine: Path):
    manifest = Manifest.read(engine)
    assert manifest.latent_tile == 16
    assert manifest.expert_ranges == ((0, 250), (250, 500), (500, 750), (750, 1000))
    assert [graph.name for graph in manifest.graphs] == [
        "expert_0",
        "expert_1",
        "expert_2",
        "expert_3",
        "decoder",
    ]


def test_unknown_entries_are_ignored(engine: Path):
    _edit(engine, lambda v: v.update(comment="later versions may add entries"))
    assert Manifest.read(engine).name == "synthetic"


DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {
    "newer schema": (lambda v: v.update(schema=2), "schema 2, this moesr reads schema 1"),
    "no schema": (lambda v: v.pop("schema"), "schema is None"),
    "missing entry": (lambda v: v.pop("tile"), "lacks tile"),
    "missing nested entry": (lambda v: v["experts"][1].pop("t_to"), "lacks experts.1.t_to"),
    "wrong type": (lambda v: v.update(steps="50"), "steps is '50', expected int"),
    "boolean for a number": (lambda v: v.update(scale=True), "scale is True, expected int"),
    "list for an object": (lambda v: v.update(schedule=[1]), "schedule is .* expected"),
    "impossible schedule": (lambda v: v["schedule"].update(beta_end=2.0), "schedule: betas"),
    "gap between experts": (lambda v: v["experts"][1].update(t_from=260), "expert_1.onnx serves t 260"),
    "experts end early": (lambda v: v["experts"].pop(), "serve t up to 750, expected 1000"),
    "no experts": (lambda v: v.update(experts=[]), "serve t up to 0, expected 1000"),
    "unknown sampler": (
        lambda v: v.update(sampler="euler"),
        "sampler is 'euler', expected one of ddpm, ddim",
    ),
    "no steps": (lambda v: v.update(steps=0), "steps is 0, expected 1 to 1000"),
    "zero tile": (lambda v: v.update(tile=0), "tile is 0"),
    "uneven tile": (lambda v: v.update(tile=62), "tile 62 is not a multiple"),
    "file outside": (lambda v: v["decoder"].update(file="../decoder.onnx"), "must be a plain file name"),
    "hash of another file": (
        lambda v: v["decoder"].update(sha256="0" * 64),
        "decoder.onnx: damaged or replaced",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_manifest(engine: Path, change: Callable[[dict], object], message: str):
    _edit(engine, change)
    with pytest.raises(EngineError, match=message) as caught:
        Manifest.read(engine)
    assert str(engine) in str(caught.value)
    assert "moesr-export" in str(caught.value)


def test_changed_graph_is_found_only_when_verifying(engine: Path):
    graph = engine / "expert_2.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(EngineError, match=r"expert_2\.onnx: damaged"):
        Manifest.read(engine)
    assert Manifest.read(engine, verify=False).tile == 64


@pytest.mark.parametrize("verify", [True, False], ids=["verify", "trust"])
def test_missing_graph(engine: Path, verify: bool):
    (engine / "expert_3.onnx").unlink()
    with pytest.raises(EngineError, match=r"expert_3\.onnx: missing"):
        Manifest.read(engine, verify=verify)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "\xff", "[" * 100_000])
def test_manifest_that_is_not_an_object(engine: Path, content: str):
    (engine / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(EngineError, match=r"manifest\.json: "):
        Manifest.read(engine)


def test_foreign_places(engine: Path, tmp_path: Path):
    with pytest.raises(EngineError, match="no such engine directory"):
        Manifest.read(tmp_path / "absent")
    with pytest.raises(EngineError, match="this is a file"):
        Manifest.read(engine / "decoder.onnx")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(EngineError, match=r"not an engine directory, it has no manifest\.json"):
        Manifest.read(tmp_path)


def test_write_refuses_what_read_would(engine: Path):
    manifest = Manifest.read(engine)
    before = sha256_of(engine / "manifest.json")
    with pytest.raises(EngineError, match="steps is 2000"):
        replace(manifest, steps=2000, decoder=Graph("decoder.onnx", "0")).write(engine)
    assert sha256_of(engine / "manifest.json") == before
