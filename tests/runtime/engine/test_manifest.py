"""Engine directories: manifests survive writing and reading, and errors name the damage and its cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from engines import build_engine

from moesr.runtime.engine.manifest_file import read_manifest, write_manifest
from moesr.runtime.engine.onnx_external_data import external_files
from moesr.runtime.errors import EngineError
from moesr.runtime.system import json_dataclass
from moesr.runtime.system.files import sha256_of


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return build_engine(tmp_path / "engine")


def _edit(engine: Path, change: Callable[[dict], object]) -> None:
    path = engine / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_round_trip(engine: Path, tmp_path: Path):
    manifest = read_manifest(engine)
    copy = build_engine(tmp_path / "copy")
    changed = replace(manifest, model={"unet": {"channel_mult": [1, 2]}}, sampler="ddim", steps=7)
    write_manifest(changed, copy)
    assert read_manifest(copy) == changed
    assert changed != manifest


def test_derived_sizes(engine: Path):
    manifest = read_manifest(engine)
    assert manifest.latent_tile == 16
    assert manifest.expert_ranges == ((0, 250), (250, 500), (500, 750), (750, 1000))
    assert list(manifest.graphs) == ["expert_0", "expert_1", "expert_2", "expert_3", "decoder"]


def test_unknown_entries_are_ignored(engine: Path):
    _edit(engine, lambda v: v.update(comment="later versions may add entries"))
    assert read_manifest(engine).name == "synthetic"


def _tensor(values: dict, role: str, name: str) -> dict:
    graph = values["graphs"][role]
    return next(spec for spec in graph["inputs"] + graph["outputs"] if spec["name"] == name)


DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {
    "newer schema": (lambda v: v.update(schema=3), "schema 3, this moesr reads schema 2"),
    "no schema": (lambda v: v.pop("schema"), "schema is None"),
    "missing entry": (lambda v: v.pop("tile"), "lacks tile"),
    "missing nested entry": (lambda v: v["experts"][1].pop("t_to"), "lacks experts.1.t_to"),
    "wrong type": (lambda v: v.update(steps="50"), "steps is '50', expected int"),
    "boolean for a number": (lambda v: v.update(scale=True), "scale is True, expected int"),
    "list for an object": (lambda v: v.update(schedule=[1]), r"schedule is \[1\], expected an object"),
    "impossible schedule": (lambda v: v["schedule"].update(beta_end=2.0), "schedule: betas"),
    "gap between experts": (lambda v: v["experts"][1].update(t_from=260), "expert_1 serves t 260"),
    "experts end early": (lambda v: v["experts"].pop(), "serve t up to 750, expected 1000"),
    "no experts": (lambda v: v.update(experts=[]), "serve t up to 0, expected 1000"),
    "expert without graph": (lambda v: v["graphs"].pop("expert_2"), "no graph 'expert_2'"),
    "no decoder": (lambda v: v["graphs"].pop("decoder"), "without a decoder, latents must be images"),
    "no encoder": (lambda v: v.update(condition="latent"), "no graph 'encoder'"),
    "latent start": (lambda v: v.update(init="latent"), "init is 'latent', which needs condition 'latent'"),
    "unknown condition": (lambda v: v.update(condition="text"), "'text', expected one of image, latent"),
    "unknown prediction": (lambda v: v.update(prediction="score"), "expected one of eps, x0, v"),
    "guidance": (lambda v: v.update(guidance=7.0), "guidance is 7.0 without a negative prompt"),
    "fidelity": (lambda v: v.update(fidelity=2), "fidelity is 2, expected a number from 0 to 1"),
    "another scale than the model's": (
        lambda v: v.update(scale=3, model={"scale": 4}),
        "scale is 3, the model's is 4",
    ),
    "unknown sampler": (
        lambda v: v.update(sampler="euler"),
        "sampler is 'euler', expected one of ddpm, ddim, dpm",
    ),
    "no steps": (lambda v: v.update(steps=0), "steps is 0, expected a number from 1"),
    "zero tile": (lambda v: v.update(tile=0), "tile is 0"),
    "uneven tile": (lambda v: v.update(tile=62), "tile 62 is not a multiple"),
    "another tile": (
        lambda v: v.update(tile=32),
        r"expert_0 is z_t float32 \[B, 3, 16, 16\].*expected z_t .*8, 8",
    ),
    "unknown input": (lambda v: _tensor(v, "decoder", "lr").update(name="hint"), "decoder is .*hint"),
    "another type": (lambda v: _tensor(v, "expert_1", "t").update(dtype="int64"), "expert_1 is .*t int64"),
    "file outside": (
        lambda v: v["graphs"]["decoder"].update(file="../decoder.onnx"),
        "expected a plain file name",
    ),
    "hash of another file": (
        lambda v: v["graphs"]["decoder"].update(sha256="0" * 64),
        "decoder.onnx: damaged or replaced",
    ),
    "weights of another file": (
        lambda v: v["graphs"]["decoder"].update(data=[{"file": "expert_0.onnx", "sha256": "0" * 64}]),
        "expert_0.onnx: damaged or replaced",
    ),
    "missing variant": (
        lambda v: v["graphs"]["decoder"].update(
            variants={"gpu": {"file": "gpu.onnx", "sha256": "0" * 64, "precision": "fp16"}}
        ),
        "gpu.onnx: missing",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_manifest(engine: Path, change: Callable[[dict], object], message: str):
    _edit(engine, change)
    with pytest.raises(EngineError, match=message) as caught:
        read_manifest(engine)
    assert str(engine) in str(caught.value)
    assert "moesr-export" in str(caught.value)


def test_changed_graph_is_found_only_by_verifying(engine: Path):
    graph = engine / "expert_2.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(EngineError, match=r"expert_2\.onnx: damaged"):
        read_manifest(engine)
    assert read_manifest(engine, verify=False).tile == 64


@pytest.mark.parametrize("verify", [True, False], ids=["verify", "trust"])
def test_missing_graph(engine: Path, verify: bool):
    (engine / "expert_3.onnx").unlink()
    with pytest.raises(EngineError, match=r"expert_3\.onnx: missing"):
        read_manifest(engine, verify=verify)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "\xff", "[" * 100_000])
def test_manifest_that_is_not_an_object(engine: Path, content: str):
    (engine / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(EngineError, match=r"manifest\.json: "):
        read_manifest(engine)


def test_paths_that_are_not_engine_directories(engine: Path, tmp_path: Path):
    with pytest.raises(EngineError, match="no such engine directory"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(EngineError, match="this is a file"):
        read_manifest(engine / "decoder.onnx")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(EngineError, match=r"not an engine directory, it has no manifest\.json"):
        read_manifest(tmp_path)


def test_write_refuses_what_read_refuses(engine: Path):
    manifest = read_manifest(engine)
    before = sha256_of(engine / "manifest.json")
    with pytest.raises(EngineError, match="steps is 2000"):
        write_manifest(replace(manifest, steps=2000), engine)
    assert sha256_of(engine / "manifest.json") == before


def test_schema_1_is_still_read(tmp_path: Path):
    """In schema 1, graphs are listed as experts and decoder, and a run has one fidelity."""
    engine = build_engine(tmp_path / "engine", experts=2)
    new = read_manifest(engine)

    def downgrade(v: dict) -> None:
        graphs = v.pop("graphs")
        v["schema"], v["precision"] = 1, "fp32"
        v["experts"] = [
            {k: e[k] for k in ("t_from", "t_to")} | {k: graphs[e["graph"]][k] for k in ("file", "sha256")}
            for e in v["experts"]
        ]
        v["decoder"] = {k: graphs["decoder"][k] for k in ("file", "sha256")}
        v["parity"] = {"decoder": graphs["decoder"]["parity"]}
        v["params"] = v["macs"] = {"expert": 1000, "decoder": 7}

    _edit(engine, downgrade)
    old = read_manifest(engine)
    assert old.experts == new.experts and list(old.graphs) == list(new.graphs)
    assert old.graphs["expert_1"].boundary == new.graphs["expert_1"].boundary
    fidelity = next(spec for spec in old.graphs["decoder"].inputs if spec.name == "fidelity")
    assert fidelity.dims == (1,)
    assert (old.graphs["decoder"].macs, old.graphs["decoder"].parity) == (7, new.graphs["decoder"].parity)
    _edit(engine, lambda v: v["experts"][1].pop("sha256"))
    with pytest.raises(EngineError, match=r"lacks experts\.1\.sha256"):
        read_manifest(engine)


def test_external_weights_must_be_listed(engine: Path):
    path = engine / "decoder.onnx"
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert external_files(path) == {"weights.bin"}
    assert external_files(engine / "expert_0.onnx") == set()
    files = {"sha256": sha256_of(path)}
    _edit(engine, lambda v: v["graphs"]["decoder"].update(files))
    with pytest.raises(EngineError, match=r"takes weights from weights\.bin, which manifest\.json does not"):
        read_manifest(engine)
    listed = {"data": [{"file": "weights.bin", "sha256": sha256_of(engine / "weights.bin")}]}
    _edit(engine, lambda v: v["graphs"]["decoder"].update(listed))
    read_manifest(engine)
    (engine / "weights.bin").write_bytes(b"other")
    with pytest.raises(EngineError, match=r"weights\.bin: damaged"):
        read_manifest(engine)


@pytest.mark.parametrize("content", [b"", b"\xff", b"not a graph", b"\x3a\x7f\x00"], ids=repr)
def test_files_that_are_not_graphs(tmp_path: Path, content: bytes):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"x\.onnx: not an ONNX file"):
        external_files(tmp_path / "x.onnx")


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "nul\0byte"], ids=["long name", "long path", "nul"])
def test_paths_that_cannot_be_examined(tmp_path: Path, name: str):
    with pytest.raises(EngineError, match="engine directory"):
        read_manifest(tmp_path / name)


def test_directory_without_read_permission(engine: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(json_dataclass, "read_bytes", refuse)
    with pytest.raises(EngineError, match=r"cannot be read \(Permission denied\); check the .* permissions"):
        read_manifest(engine)


def _nested(levels: int) -> bytes:
    """Return an ONNX file whose graphs are nested: model > graph > node > attribute > graph > .."""

    def field(number: int, content: bytes) -> bytes:
        length, size = len(content), b""
        while True:
            size += bytes([(length & 127) | (128 if length > 127 else 0)])
            length >>= 7
            if not length:
                return bytes([(number << 3) | 2]) + size + content

    content = b""
    for _ in range(levels):
        content = field(6, field(1, field(5, content)))
    return field(7, field(1, field(5, content)))


@pytest.mark.parametrize("levels", [40, 2000])
def test_deeply_nested_graphs_are_refused(tmp_path: Path, levels: int):
    path = tmp_path / "deep.onnx"
    path.write_bytes(_nested(levels))
    with pytest.raises(
        EngineError, match=r"deep\.onnx: not an ONNX file \(its messages are nested more than 100"
    ):
        external_files(path)
    path.write_bytes(_nested(20))
    assert external_files(path) == set()


def test_unreadable_graphs_raise_engine_error(tmp_path: Path):
    with pytest.raises(EngineError, match=r"cannot be read"):
        external_files(tmp_path)
