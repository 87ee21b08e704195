"""docs/engine-format.schema.json agrees with the runtime, which refuses whatever the schema refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import REPO
from engines import build_engine
from mutations import check_reader

from moesr.runtime.engine.graph_spec import Arrangement, Graph
from moesr.runtime.engine.locate import DEMO_ENGINES, engine_directory
from moesr.runtime.engine.manifest import AutoencoderManifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError

SCHEMA = json.loads((REPO / "docs" / "engine-format.schema.json").read_text())


def load(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


@pytest.mark.parametrize("name", DEMO_ENGINES)
def test_bundled_manifests_are_valid(name: str):
    values = load(engine_directory(name))
    assert values["schema"] == 2
    jsonschema.validate(values, SCHEMA)


@pytest.mark.parametrize("encoder", [False, True])
def test_written_manifests_are_valid(tmp_path: Path, encoder: bool):
    jsonschema.validate(load(build_engine(tmp_path, encoder=encoder)), SCHEMA)


def test_every_entry_has_a_description():
    described = {field.name for field in dataclasses.fields(AutoencoderManifest)}
    assert set(SCHEMA["properties"]) == described
    graph, arrangement = SCHEMA["$defs"]["graph"], SCHEMA["$defs"]["arrangement"]
    assert set(graph["properties"]) == {field.name for field in dataclasses.fields(Graph)}
    assert set(arrangement["properties"]) == {field.name for field in dataclasses.fields(Arrangement)}
    page = (REPO / "docs" / "engine-format.md").read_text()
    assert all(f"`{name}`" in page for name in described | set(graph["properties"]))


BROKEN = {
    "an invalid hash": lambda v: v["graphs"]["decoder"].update(sha256="xyz"),
    "a file outside": lambda v: v["graphs"]["decoder"].update(file="../x.onnx"),
    "an input without dims": lambda v: v["graphs"]["expert_0"]["inputs"][0].pop("dims"),
    "an unknown condition": lambda v: v.update(condition="text"),
    "no experts": lambda v: v.update(experts=[]),
    "no tile": lambda v: v.pop("tile"),
}


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_refused_manifests_are_not_valid(tmp_path: Path, harm: Any):
    values = copy.deepcopy(load(build_engine(tmp_path)))
    harm(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_reader_refuses_what_the_schema_refuses(every: int, tmp_path: Path):
    engine = build_engine(tmp_path, experts=1)
    values = load(engine)
    graph = values["graphs"]["decoder"]
    graph["calibration"] = {
        "images": 3,
        "steps": 4,
        "runs": 5,
        "method": "percentile",
        "int8_fraction": 0.5,
        "kept": ["a"],
    }
    same = {"file": graph["file"], "sha256": graph["sha256"]}
    graph["data"] = [same]
    graph["variants"] = {"gpu": same | {"precision": "fp16"}}

    def read(changed: Any) -> None:
        (engine / "manifest.json").write_text(json.dumps(changed))
        read_manifest(engine, verify=False)

    assert check_reader(values, SCHEMA, read, EngineError, every=every) > 500 / every


def test_calibration_of_older_engines_is_still_read(tmp_path: Path):
    engine = build_engine(tmp_path, experts=1)
    values = load(engine)
    old = {"images": 3, "steps": 4, "runs": 5, "method": "percentile", "share": 0.25, "kept": []}
    graph = values["graphs"]["decoder"]
    graph["calibration"] = old
    variant = {name: graph[name] for name in ("file", "sha256", "precision")} | {"calibration": old}
    values["graphs"]["expert_0"]["variants"] = {"cpu": variant}
    jsonschema.validate(values, SCHEMA)
    (engine / "manifest.json").write_text(json.dumps(values))
    manifest = read_manifest(engine)
    for found in (manifest.graphs["decoder"], manifest.graphs["expert_0"].variants["cpu"]):
        assert found.calibration and found.calibration.int8_fraction == 0.25
