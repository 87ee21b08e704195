"""Pushing an engine to the Hugging Face hub: its files, its model card, the repository, and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from engines import build_engine
from hub_server import TOKEN, HubServer, connect, hub_server

from moesr.export import cli, package
from moesr.export.model_card import BEGIN, END, model_card
from moesr.runtime.engine.locate import engine_directory
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.training import checkpoint


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub_server() as made:
        yield made


@pytest.fixture
def hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The server without repositories, and a token that it knows."""
    server.reset()
    connect(server, monkeypatch, tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine, and other files in its directory."""
    made = build_engine(tmp_path / "engine", experts=2, prompts=("a photo", "blurred | <b>"))
    (made / "tensorrt").mkdir()
    (made / "tensorrt/graph.plan").write_bytes(b"plan")
    (made / "notes.txt").write_text("mine")
    return made


def test_engine_is_pushed_with_a_card_and_comes_back(hub, engine, capsys):
    assert cli.main([str(engine), "--push", "o/new", "--private", "--message", "The first one"]) == 0
    found = hub.repositories["o/new"]
    commit = found.refs["main"]
    assert capsys.readouterr().out == f"pushed to hf://o/new@{commit}\n"
    assert found.private and hub.messages == ["The first one"]
    named = {file.file for file in read_manifest(engine).files}
    assert found.commits[commit].keys() == named | {"manifest.json", "README.md", ".gitattributes"}
    back = engine_directory("hf://o/new")
    assert read_manifest(back) == read_manifest(engine)
    assert all((back / name).read_bytes() == (engine / name).read_bytes() for name in named)


def test_card_tells_the_facts_of_the_manifest(hub, engine):
    assert cli.main([str(engine), "--push", "hf://o/new", "--quiet"]) == 0
    found = hub.repositories["o/new"]
    assert not found.private and hub.messages == ["Upload the engine synthetic in fp32"]
    card = found.commits[found.refs["main"]]["README.md"].decode()
    head, _, text = card.removeprefix("---\n").partition("---\n")
    assert "library_name: moesr" in head and "# license: " in head and "\nlicense:" not in head
    assert "# synthetic, x4" in text
    assert "pip install 'moesr[cpu,hub]'\nmoesr-run photo.jpg --engine hf://o/new\n" in text
    for fact in (
        "| model | synthetic: 2 experts, one per range of noise, 3 parameters |",
        "| scale | 4 output pixels per input pixel, along one side |",
        "| sampling | 4 steps of ddpm by default |",
        "| precision | fp32 |",
        "| size | 3 files, ",
        "tiles of 64 x 64 output pixels |",
        "network: 0.0e+00, at most 1e-05 is allowed |",
        "| prompts | a photo, away from blurred &#124; &#60;b&#62; |",
        "| made with | moesr 0 |",
        f"| checkpoint | SHA-256 {'0' * 64} |",
    ):
        assert fact in text


def test_card_of_the_owner_is_kept(hub, engine):
    assert cli.main([str(engine), "--push", "o/new", "--quiet"]) == 0
    found = hub.repositories["o/new"]
    first = found.commits[found.refs["main"]]["README.md"].decode()
    owned = first.replace("# license: ", "license: mit  # ") + "\nWords of the owner.\n"
    found.commit({"README.md": owned.replace("synthetic", "earlier").encode()})
    assert cli.main([str(engine), "--push", "o/new", "--quiet", "--private"]) == 0
    assert found.commits[found.refs["main"]]["README.md"].decode() == owned
    assert not found.private, "an existing repository keeps its visibility"
    manifest = read_manifest(engine)
    added = model_card(manifest, engine, "o/new", "# Mine\n")
    assert added.startswith(f"# Mine\n\n{BEGIN}\n# synthetic") and added.endswith(f"{END}\n")


def test_new_engine_is_exported_and_pushed(hub, tmp_path, monkeypatch, capsys):
    def export(checkpoint: object, directory: Path, *args: object, **options: object) -> object:
        return read_manifest(build_engine(directory))

    config = SimpleNamespace(name="new", expert_ranges=((0, 1000),))
    monkeypatch.setattr(package, "export_engine", export)
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: SimpleNamespace(config=config))
    assert cli.main([str(tmp_path), "-o", str(tmp_path / "made"), "--push", "o/new"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"wrote {tmp_path / 'made'} (synthetic") and lines[1].startswith(
        "pushed to hf://o/new@"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--push", "new"], "expected hf://owner/name"),
        (["--push", "o/new@v1"], "engines are pushed to the branch main; leave out @v1"),
        (["--push", "o/new", "-o", "x"], "is an engine and is pushed as it is; leave out -o"),
        (["--private"], "--private and --message need --push OWNER/NAME"),
    ],
)
def test_wrong_options_are_refused(hub, engine, arguments, says, capsys):
    assert cli.main([str(engine), *arguments]) == 2
    assert says in capsys.readouterr().err and not hub.requests


def test_missing_conditions_are_named_before_the_work(hub, engine, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cli.main([str(engine), "--push", "o/new"]) == 2
    assert "HF_HUB_OFFLINE is set; unset it" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    assert cli.main(["demo-x4", "--push", "o/new"]) == 2
    assert "needs a token; log in with: hf auth login (or set HF_TOKEN)" in capsys.readouterr().err
    assert not hub.requests


def test_failed_upload_says_how_to_repeat_it(hub, engine, capsys, monkeypatch):
    hub.read_only = True
    assert cli.main([str(engine), "--push", "o/new"]) == 1
    said = capsys.readouterr().err
    assert f"hf://o/new: the token may not write there; make one with write access at {hub.url}" in said
    assert f"is complete, push it with: moesr-export {engine} --push o/new" in said
    hub.status = 418
    assert cli.main([str(engine), "--push", "o/new"]) == 1
    assert "answers with status 418" in capsys.readouterr().err


def test_damaged_engine_is_not_uploaded(hub, engine, capsys):
    (engine / "decoder.onnx").write_bytes(b"damaged")
    assert cli.main([str(engine), "--push", "o/new"]) == 3
    assert "damaged or replaced" in capsys.readouterr().err and not hub.requests
    shutil.copy(engine / "expert_0.onnx", engine / "decoder.onnx")
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["graphs"]["decoder"]["file"] = "../notes.txt"
    (engine / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main([str(engine), "--push", "o/new"]) == 3 and not hub.requests
