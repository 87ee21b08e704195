"""docs/engine-format.schema.json says what the runtime reads: bundled and written manifests are valid."""

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

from moesr.runtime.engine.graph_spec import Arrangement, Graph
from moesr.runtime.engine.locate import DEMO_ENGINES, engine_directory
from moesr.runtime.engine.manifest import Manifest

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


def test_every_entry_is_described():
    described = {field.name for field in dataclasses.fields(Manifest)}
    assert set(SCHEMA["properties"]) == described
    graph, arrangement = SCHEMA["$defs"]["graph"], SCHEMA["$defs"]["arrangement"]
    assert set(graph["properties"]) == {field.name for field in dataclasses.fields(Graph)}
    assert set(arrangement["properties"]) == {field.name for field in dataclasses.fields(Arrangement)}
    page = (REPO / "docs" / "engine-format.md").read_text()
    assert all(f"`{name}`" in page for name in described | set(graph["properties"]))


BROKEN = {
    "a hash that is none": lambda v: v["graphs"]["decoder"].update(sha256="xyz"),
    "a file outside": lambda v: v["graphs"]["decoder"].update(file="../x.onnx"),
    "an input without dims": lambda v: v["graphs"]["expert_0"]["inputs"][0].pop("dims"),
    "an unknown condition": lambda v: v.update(condition="text"),
    "no experts": lambda v: v.update(experts=[]),
    "no tile": lambda v: v.pop("tile"),
}


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_what_the_runtime_refuses_is_not_valid(tmp_path: Path, harm: Any):
    values = copy.deepcopy(load(build_engine(tmp_path)))
    harm(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA)
