"""Engines in repositories of the Hugging Face hub: names, downloads, the cache, errors, hostile manifests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import onnx
import pytest
from engines import build_engine
from hub_server import TOKEN, HubServer, connect, hub_server
from PIL import Image

from moesr.runtime import EngineError, Upscaler, UsageError
from moesr.runtime.backends import ort, ov
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.cli import doctor, run
from moesr.runtime.cluster.engines import engine_on_this_node, name_for_nodes
from moesr.runtime.engine import hub as hub_module
from moesr.runtime.engine import onnx_external_data
from moesr.runtime.engine.hub_names import name_of, origin_of, parse
from moesr.runtime.engine.locate import engine_directory
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.images import provenance
from moesr.runtime.serve.cli import named_engines
from moesr.runtime.system import file_hashes, files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub_server() as made:
        yield made


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("built") / "engine", experts=1, steps=1)


@pytest.fixture
def hub(server: HubServer, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The server with the engine in owner/name, and an empty cache."""
    server.reset()
    server.repository("owner/name", engine)
    connect(server, monkeypatch, tmp_path)
    return server


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("hf://owner/name", "owner/name", None),
        ("hf://o-w_n.er/na.me-x4_2@v1.0", "o-w_n.er/na.me-x4_2", "v1.0"),
        ("hf://owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
        ("hf://owner/name@feature%2Ftiles", "owner/name", "feature/tiles"),
        (f"hf://owner/name@{COMMIT}", "owner/name", COMMIT),
    ],
)
def test_name_has_repository_and_revision(text, repository, revision):
    name = parse(text)
    assert (name.repository, name.revision) == (repository, revision)
    assert parse(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        *("hf://", "hf://name", "hf://owner/", "hf:///name", "hf://owner/name/file", "hf://owner/na me"),
        *(
            "hf://owner/../name",
            "hf://owner/na--me",
            "hf://-owner/name",
            "hf://owner/name.",
            "hf://owner/a.git",
        ),
        *("hf://owner/näme", "hf://owner/name\n", "hf://owner/" + "a" * 100, "hf://owner/na%2Fme"),
        *("hf://owner/name@", "hf://owner/name@a b", "hf://owner/name@../up", "hf://owner/name@a/../b"),
        *("hf://owner/name@%2e%2e/up", "hf://owner/name@/etc", "hf://owner/name@a\x1b", "hf://owner/name@-x"),
        *("hf://owner/name@a.lock", "hf://owner/name@a@{1}", "hf://owner/name@a:b", "hf://owner/name@a/.b"),
    ],
)
def test_wrong_name_is_refused(text):
    with pytest.raises(UsageError, match=r"expected hf://owner/name|expected a branch, a tag or a commit"):
        engine_directory(text)


def test_name_for_python_takes_the_revision_apart():
    assert name_of("owner/name") == name_of("hf://owner/name") == "hf://owner/name"
    assert name_of("owner/name", "feature/tiles") == "hf://owner/name@feature/tiles"
    with pytest.raises(UsageError, match="has a revision already"):
        name_of("owner/name@v1", "v2")
    for wrong in ("engine", "/srv/engine", "./engine"):
        with pytest.raises(UsageError, match="expected hf://owner/name"):
            Upscaler.from_pretrained(wrong)


def test_origin_is_known_from_the_place_in_the_cache():
    assert origin_of(Path(f"/c/models--o-w--n.m/snapshots/{COMMIT}")) == f"hf://o-w/n.m@{COMMIT}"
    others = (f"/c/datasets--o--n/snapshots/{COMMIT}", f"/c/models--o/snapshots/{COMMIT}", "/c/engine", "/")
    assert not any(origin_of(Path(other)) for other in (*others, "/c/models--o--n/snapshots/main"))


def test_only_the_files_of_the_manifest_are_downloaded(hub, engine):
    found = hub.repositories["owner/name"]
    found.commit({"secret.bin": b"x" * 99, "kernels/kernels.json": b"{}", "README.md": b"# Engine"})
    lr = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    with Upscaler(engine) as local, Upscaler.from_pretrained("owner/name", threads=1) as up:
        np.testing.assert_array_equal(up(lr), local(lr))
        assert (up.origin, local.origin) == (f"hf://owner/name@{found.refs['main']}", "")
        named = {file.file for file in up.manifest.files} | {"manifest.json"}
        assert {path.name for path in up.directory.iterdir()} == named
    hub.requests.clear()
    assert engine_directory("hf://owner/name") == up.directory
    assert hub.count("GET", "/resolve/") == hub.count("GET", "/large/") == 0


def test_revision_is_a_branch_a_tag_or_a_commit(hub, engine):
    found = hub.repositories["owner/name"]
    first = found.refs["v1"] = found.refs["main"]
    later = found.commit({"manifest.json": (engine / "manifest.json").read_bytes() + b" "})
    found.refs["refs/pr/1"] = first
    for revision, commit in (("main", later), ("v1", first), ("refs/pr/1", first), (first, first)):
        assert engine_directory(f"hf://owner/name@{revision}").name == commit
    hub.requests.clear()
    assert engine_directory(f"hf://owner/name@{first}").name == first
    assert not hub.requests, "a commit that is cached needs no network"
    second = found.commit({"manifest.json": (engine / "manifest.json").read_bytes() + b"\n"})
    assert engine_directory("hf://owner/name").name == second, "a branch is asked for every time"


def test_cached_engine_serves_without_a_network(hub, monkeypatch, caplog, tmp_path):
    directory = engine_directory("hf://owner/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert engine_directory("hf://owner/name") == directory and not hub.requests
    assert not caplog.records, "offline mode was asked for, so nothing is said about it"
    with pytest.raises(EngineError, match=r"hub, and HF_HUB_OFFLINE forbids downloads; unset it once"):
        engine_directory("hf://owner/other")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
    assert engine_directory("hf://owner/name") == directory
    assert f"commit {directory.name[:8]} is used, because {nowhere} cannot be reached" in caplog.text
    with pytest.raises(EngineError, match=r"cannot be reached, or .*check the network and run again"):
        engine_directory("hf://owner/other")
    (directory / "decoder.onnx").unlink()
    with pytest.raises(EngineError, match="cannot be reached"):
        engine_directory("hf://owner/name")


@pytest.mark.parametrize(
    ("how", "revision", "says"),
    [
        (None, "", r"no such repository, or it is private; .* hf auth login \(or set HF_TOKEN\)"),
        ({"private": True}, "", "no such repository, or it is private"),
        ({"gated": True}, "", r"access must be granted; ask for it at http://.*/owner/that, then log in"),
        ({}, "@v9", r"no branch, tag or commit 'v9'; they are listed at http://.*/owner/that"),
        ({}, f"@{COMMIT}", f"no branch, tag or commit '{COMMIT}'"),
    ],
    ids=["absent", "private", "gated", "branch", "commit"],
)
def test_repository_that_cannot_be_used_is_explained(hub, engine, how, revision, says):
    if how is not None:
        hub.repository("owner/that", engine, **how)
    with pytest.raises(EngineError, match=f"^hf://owner/that{revision}: .*{says}"):
        Upscaler(f"hf://owner/that{revision}")


def test_token_opens_private_and_gated_repositories(hub, engine, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for kind in ("private", "gated"):
        hub.repository(f"owner/{kind}", engine, **{kind: True})
        assert read_manifest(engine_directory(f"hf://owner/{kind}")).name == "synthetic"


def test_answers_that_are_no_answers_are_explained(hub, monkeypatch):
    hub.status = 418
    with pytest.raises(EngineError, match="answers with status 418; try again later"):
        engine_directory("hf://owner/name")
    hub.status = 0
    del hub.repositories["owner/name"].commits[hub.repositories["owner/name"].refs["main"]]["manifest.json"]
    with pytest.raises(EngineError, match=r"no manifest\.json, so it holds no engine"):
        engine_directory("hf://owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'moesr\[hub\]'"):
        engine_directory("hf://owner/name")


def test_download_that_breaks_off_is_continued_later(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.broken_off.add("/large/")
    with pytest.raises(EngineError, match="run again, which continues the download"):
        engine_directory("hf://owner/name")
    hub.broken_off.clear()
    read_manifest(engine_directory("hf://owner/name"))


def _file_named(name: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["decoder"]["file"] = name

    return change


def _other_hash(manifest: dict[str, Any]) -> None:
    manifest["graphs"]["decoder"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_file_named("../../../etc/passwd"), "a plain file name inside the engine directory"),
        (_file_named("/etc/passwd"), "a plain file name inside the engine directory"),
        (_file_named("..\\up.onnx"), "a plain file name inside the engine directory"),
        (_file_named("folder/decoder.onnx"), "a plain file name inside the engine directory"),
        (_file_named("absent.onnx"), r"names 'absent\.onnx', which the repository does not have"),
        (_file_named("*.onnx"), r"names '\*\.onnx', which the repository does not have"),
        (_other_hash, r"'decoder\.onnx' in the repository has SHA-256 .*, the manifest says 000000000000"),
        (lambda manifest: manifest.update(tile=-1), "tile"),
        (lambda manifest: manifest.clear(), "schema"),
    ],
    ids=["up", "absolute", "backslash", "folder", "absent", "pattern", "hash", "value", "empty"],
)
def test_hostile_manifest_is_refused_before_anything_else_is_downloaded(hub, engine, change, says):
    manifest = json.loads((engine / "manifest.json").read_text())
    change(manifest)
    hub.repositories["owner/name"].commit({"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(EngineError, match=says):
        engine_directory("hf://owner/name")
    assert hub.count("GET", "/resolve/") == 1 and hub.count("GET", "/large/") == 0


def test_sizes_are_known_before_a_download(hub):
    hub.told_sizes["decoder.onnx"] = 10**16
    with pytest.raises(EngineError, match=r"its files need 10000000\.0 GB, .* free in .*set HF_HOME"):
        engine_directory("hf://owner/name")
    assert hub.count("GET", "/large/") == 0
    hub.told_sizes["manifest.json"] = 1 << 30
    hub.requests.clear()
    with pytest.raises(EngineError, match=r"its manifest\.json has 1\.1 GB, expected at most 17 MB"):
        engine_directory("hf://owner/name")
    assert hub.count("GET", "/resolve/") == 0


def test_damage_in_the_cache_is_found_with_its_cure(hub):
    directory = engine_directory("hf://owner/name")
    (directory / "decoder.onnx").resolve().write_bytes(b"damaged")
    with pytest.raises(EngineError, match=rf"SHA-256 .*; remove {directory.parents[1]} and run again"):
        Upscaler("hf://owner/name")
    shutil.rmtree(directory.parents[1])
    Upscaler("hf://owner/name").close()


def test_cached_files_are_hashed_once(hub, monkeypatch):
    monkeypatch.setattr(file_hashes, "LARGE", 1)
    monkeypatch.setattr(file_hashes, "SETTLED_NS", 0)
    hashed: list[Path] = []
    original = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.append(path) or original(path))
    for _ in range(2):
        read_manifest(engine_directory("hf://owner/name"))
    assert sorted(path.name for path in hashed) == ["decoder.onnx", "expert_0.onnx"]


@pytest.mark.parametrize("backend", [ort, ov], ids=["onnxruntime", "openvino"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_weights_that_are_links_out_of_the_directory_are_read(engine, tmp_path, backend, links, monkeypatch):
    """OpenVINO refuses such weights, and so do some versions of ONNX Runtime."""
    stored, cached = tmp_path / "blobs", tmp_path / "models--o--n/snapshots/main"
    stored.mkdir()
    cached.mkdir(parents=True)
    model = onnx.load(engine / "decoder.onnx")
    large = onnx.numpy_helper.from_array(np.full((1, 3, 64, 64), 0.25, np.float32), "large")
    model.graph.initializer.append(large)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Add", ["before", "large"], ["image"]))
    onnx.save(model, stored / "d.onnx", save_as_external_data=True, location="d.weights", size_threshold=1000)
    for name in ("d.onnx", "d.weights"):
        (stored / name).rename(stored / f"hash-{name}")
        (cached / name).symlink_to(stored / f"hash-{name}")
    if not links:
        monkeypatch.setattr(os, "link", lambda source, target: (_ for _ in ()).throw(OSError("no links")))
    graph = read_manifest(engine).graphs["decoder"]
    session = backend.open_session(cached / "d.onnx", graph.boundary, SessionOptions())
    buffers = {spec.name: np.zeros(spec.shape(1), np.float32) for spec in (*graph.inputs, *graph.outputs)}
    session.bind(buffers, 1)
    session.enqueue(1)
    assert buffers["image"].mean() == pytest.approx(0.25, abs=0.1) and buffers["image"].any()
    session.close()
    assert sorted(path.name for path in stored.iterdir()) == ["hash-d.onnx", "hash-d.weights"]
    with onnx_external_data.regular_files(engine / "decoder.onnx") as same:
        assert same == engine / "decoder.onnx"


def test_result_names_repository_and_commit(hub, engine, tmp_path, capsys):
    picture, target = tmp_path / "a.png", tmp_path / "a_x4.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    assert run.main([str(picture), "--engine", "hf://owner/name@main"]) == 0
    origin = f"hf://owner/name@{hub.repositories['owner/name'].refs['main']}"
    record = provenance.read(target)
    assert record and record.origin == origin
    assert run.main(["--info", str(target)]) == 0
    said = capsys.readouterr().out
    assert f"engine from    {origin}\n" in said and f"--engine {origin} " in said
    assert run.main([str(picture), "--engine", str(engine)]) == 0, "the same engine in another place"
    local = replace(record, origin="")
    assert not record.differences(local) and "origin" not in local.to_json()
    assert doctor.main(["--engine", "hf://owner/name", "--no-cache"]) == 0
    assert origin in capsys.readouterr().out


def test_service_and_cluster_name_engines_of_the_hub(hub):
    given = ["hf://owner/name@a=b", "other=hf://owner/name", "s3://bucket/engine", "/srv/demo"]
    assert named_engines(given) == {
        "name": "hf://owner/name@a=b",
        "other": "hf://owner/name",
        "engine": "s3://bucket/engine",
        "demo": "/srv/demo",
    }
    with pytest.raises(UsageError, match="expected hf://owner/name"):
        named_engines(["hf://owner"])
    commit = hub.repositories["owner/name"].refs["main"]
    assert name_for_nodes("hf://owner/name@main") == f"hf://owner/name@{commit}"
    assert engine_on_this_node(f"hf://owner/name@{commit}").name == commit


def test_library_takes_its_variables_from_the_environment(hub, engine, tmp_path):
    """A process of its own: HF_ENDPOINT, HF_HOME and HF_TOKEN are read when the library is imported."""
    hub.repository("owner/private", engine, private=True)
    code = "import sys; from moesr.runtime.engine.locate import engine_directory as d; print(d(sys.argv[1]))"
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, "hf://owner/private"]
    said = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=True).stdout
    assert Path(said.strip()).parent == tmp_path / "hub/models--owner--private/snapshots"


def test_library_shows_no_bars_if_only_warnings_are_shown(hub, monkeypatch):
    shown: list[bool] = []
    original = huggingface_hub.hf_hub_download

    def download(*args: Any, **options: Any) -> Any:
        shown.append(not huggingface_hub.utils.are_progress_bars_disabled())
        return original(*args, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(hub_module.log, "level", 30)
    engine_directory("hf://owner/name")
    assert shown[-1] is False and not huggingface_hub.utils.are_progress_bars_disabled()
