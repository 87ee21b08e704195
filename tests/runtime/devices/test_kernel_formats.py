"""kernels.json, parts.json and plan.json: written files fit their schemas, and other files are refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import REPO
from cuda_simulation import SimulatedDriver, write_kernels
from mutations import check_reader

from moesr.runtime.backends.tensorrt import plan_store
from moesr.runtime.devices import compiled_kernels, operator_plan
from moesr.runtime.devices.compiled_kernels import KernelFiles, read
from moesr.runtime.devices.grid_expressions import evaluate
from moesr.runtime.devices.loop_kernels import LoopKernels
from moesr.runtime.devices.operator_plan import (
    CompiledKernel,
    KernelIndex,
    KernelLaunch,
    KernelTarget,
    OperatorPlan,
    PlanBuffer,
)
from moesr.runtime.engine import partitioned_graph
from moesr.runtime.engine.partitioned_graph import read_parts
from moesr.runtime.errors import EngineError


def schema(name: str) -> dict[str, Any]:
    return json.loads((REPO / "docs" / f"{name}-format.schema.json").read_text())


def test_written_kernels_json_is_valid(tmp_path: Path):
    jsonschema.validate(json.loads((write_kernels(tmp_path) / "kernels.json").read_text()), schema("kernels"))


def index() -> KernelIndex:
    target = KernelTarget("sm_90/a.cubin", "a" * 64, "rows", 128, 1024, {"global_scratch": 0})
    kernel = CompiledKernel(
        "rows", "rows", ("*fp16", "i32", "fp32"), {"BLOCK": 4, "FUSED": True}, {"sm_90": target}
    )
    buffers = (
        PlanBuffer("x", "fp16", ("batch", 4), "input"),
        PlanBuffer("w", "fp32", (4,), "table", "tables/w.bin", "b" * 64),
    )
    launch = KernelLaunch("rows.1", ("x", "batch", "gain"), ("cdiv(batch, 4)", 2))
    shape = {"batch": 1}
    plan = OperatorPlan(
        "rows", "fp16", shape, shape | {"gain": 0.5}, buffers, (launch,), ("sm_90", "ptx"), "a case"
    )
    details = {
        "triton": "3.6.0",
        "toolkit": "12.8",
        "architectures": ("sm_90",),
        "sources": {"rows": "c" * 64},
    }
    return KernelIndex(operator_plan.SCHEMA, {"rows.1": kernel}, (plan,), **details)


def test_kernels_json_refused_by_the_schema_is_not_read(tmp_path: Path):
    def sealed(values: Any) -> None:
        if isinstance(values.get("sha256"), str) and len(values["sha256"]) == 64:
            values = values | {"sha256": operator_plan.digest(values)}
        (tmp_path / "kernels.json").write_text(json.dumps(values))
        read(tmp_path)

    assert check_reader(json.loads(index().to_json()), schema("kernels"), sealed, EngineError) > 500


def test_changed_value_of_kernels_json_is_found(tmp_path: Path):
    text = index().to_json()
    (tmp_path / "kernels.json").write_text(text)
    assert read(tmp_path) == index()
    (tmp_path / "kernels.json").write_text(text.replace("cdiv(batch, 4)", "cdiv(batch, 8)"))
    with pytest.raises(EngineError, match="do not match its recorded hash"):
        read(tmp_path)


PARTS = {
    "schema": 2,
    "inputs": ["z"],
    "outputs": ["image"],
    "values": {
        "z": {"dtype": "float32", "dims": ["B", 3, 8, 8]},
        "a.nhwc": {"dtype": "float16", "dims": ["B", 8, 8, 8]},
        "image": {"dtype": "float32", "dims": ["B", 3, 16, 16]},
    },
    "constants": "decoder.constants.bin",
    "steps": [
        {
            "plan": None,
            "kernel": {
                "op": "rows",
                "dtype": "fp16",
                "shape": {"C": 8},
                "inputs": {"x": "z"},
                "outputs": {"y": "a.nhwc"},
                "constants": {"w": {"offset": 0, "nbytes": 64}},
                "scalars": {"batch": "B", "gain": 0.5, "rows": 3},
            },
        },
        {
            "plan": {
                "file": "decoder.part_0.onnx",
                "sha256": "a" * 64,
                "inputs": ["a.nhwc"],
                "outputs": ["image"],
            },
            "kernel": None,
        },
    ],
}


@pytest.mark.parametrize("turned", [False, True], ids=["kernel first", "plan first"])
def test_parts_json_refused_by_the_schema_is_not_read(tmp_path: Path, turned: bool):
    path, document = tmp_path / "decoder.parts.json", dict(PARTS)
    if turned:  # only the first entry of a list is changed
        kernel, plan = PARTS["steps"]
        swapped = plan | {"plan": plan["plan"] | {"inputs": ["z"], "outputs": ["a.nhwc"]}}
        after = kernel | {"kernel": kernel["kernel"] | {"inputs": {"x": "a.nhwc"}, "outputs": {"y": "image"}}}
        document["steps"] = [swapped, after]

    def written(values: Any) -> None:
        path.write_text(json.dumps(values))
        read_parts(path)

    assert check_reader(document, schema("parts"), written, EngineError) > 150


def test_plan_json_refused_by_the_schema_is_not_read(tmp_path: Path):
    key = plan_store.PlanKey("ab" * 32, "tensorrt_rtx", "1.7.0.53", 89, 4)
    path = plan_store.write_plan(tmp_path, key, "decoder.onnx", b"a plan") / "plan.json"
    document = json.loads(path.read_text())

    def written(values: Any) -> None:
        path.write_text(json.dumps(values))
        if not plan_store.list_plans(tmp_path):
            raise ValueError

    assert check_reader(document, schema("plan"), written, ValueError) > 80


def test_all_fields_are_described():
    definitions = schema("kernels")["$defs"]
    for kind, name in (
        (CompiledKernel, "kernel"),
        (KernelTarget, "compiled"),
        (OperatorPlan, "plan"),
        (PlanBuffer, "buffer"),
        (KernelLaunch, "launch"),
    ):
        assert set(definitions[name]["properties"]) == {field.name for field in dataclasses.fields(kind)}
    assert set(schema("kernels")["properties"]) == {f.name for f in dataclasses.fields(KernelIndex)} | {
        "sha256"
    }
    assert set(schema("parts")["properties"]) == {f.name for f in dataclasses.fields(partitioned_graph.Parts)}
    assert set(schema("plan")["properties"]) == {f.name for f in dataclasses.fields(plan_store.PlanRecord)}


HOSTILE = {
    "unfinished": "a +",
    "division by zero": "1 // 0",
    "cdiv by zero": "cdiv(1, 0)",
    "deep": "-(" * 99 + ")" * 2,
    "long": "1" * 6000,
    "a power": "2 ** 9",
    "too large": "99999999999 * 99999999999",
    "one argument": "cdiv(1)",
    "no arguments": "min()",
    "a keyword": "min(1, 2, key=3)",
    "a truth value": "True",
    "another name": "m",
    "an attribute": "n.real",
    "a text": "'a'",
    "nothing": "",
    "a NUL": "1\0",
    "a line": "1\n2",
    "infinite": "x",
}


@pytest.mark.parametrize("expression", HOSTILE.values(), ids=HOSTILE)
def test_expressions_that_cannot_be_evaluated_raise_value_error(expression: str):
    with pytest.raises(ValueError):
        evaluate(expression, {"n": 3, "x": float("inf")})


def test_expressions():
    names = {"n": 7, "gain": 2.0}
    for text, value in {
        "cdiv(n, 2)": 4,
        "n // 2 * 3 - 1": 8,
        "max(n, gain)": 7,
        "-n + 9": 2,
        "12": 12,
    }.items():
        assert evaluate(text, names) == value
    assert evaluate(5, {}) == 5


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Simulated kernels whose files are in an archive."""
    pytest.importorskip("torch")
    from moesr.kernels import ship

    ship.pack(write_kernels(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_kernels_are_read_from_an_archive(packed: Path):
    assert {path.name for path in packed.iterdir()} == {"kernels.json", "sm_90.tar.gz"}
    driver = SimulatedDriver()
    LoopKernels(KernelFiles(packed, driver)).step(256)
    assert driver.loads == ["sampler_step"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[: len(data) // 2], "sm_90.tar.gz: it is cut short"),
        (lambda data: b"no archive", "sm_90.tar.gz: it is damaged"),
        (lambda data: gzip.compress(b"no tar file" * 100), "sm_90.tar.gz: it is damaged"),
        (lambda data: gzip.compress(bytes(1 << 20)), r"sm_90/.*: does not match its recorded hash"),
        (lambda data: gzip.compress(bytes(1 << 23)), "sm_90.tar.gz: .* holds more than 1048576 bytes"),
    ],
    ids=["cut", "not gzip", "not tar", "empty", "a bomb"],
)
def test_a_damaged_archive_is_refused(packed: Path, monkeypatch, change, message: str):
    monkeypatch.setattr(compiled_kernels, "MAX_FILE_BYTES", 1 << 20)
    archive = packed / "sm_90.tar.gz"
    archive.write_bytes(change(archive.read_bytes()))
    loop = LoopKernels(KernelFiles(packed, SimulatedDriver()))
    with pytest.raises(EngineError, match=f"{message}.*make them with: python -m moesr.kernels.build"):
        loop.step(256)
