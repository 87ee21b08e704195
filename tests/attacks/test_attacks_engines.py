"""Hostile engine directories end with exit code 3 and a message that names the file and the cure."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from engines import build_engine
from hostile_engines import GRAPHS, JSON_TEXTS, MANIFESTS, EngineAttack
from hostile_images import picture

from moesr.runtime.backends.tensorrt import plan_store
from moesr.runtime.cli.run import main
from moesr.runtime.devices import compiled_kernels
from moesr.runtime.engine.partitioned_graph import read_parts
from moesr.runtime.errors import EngineError

ATTACKS = {f"manifest-{name}": attack for name, attack in MANIFESTS.items()} | {
    f"graph-{name}": attack for name, attack in GRAPHS.items()
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=4)


@pytest.mark.parametrize("attack", [pytest.param(a, id=name) for name, a in ATTACKS.items()])
def test_refused_with_a_cure(
    attack: EngineAttack, sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    engine = tmp_path / "engine"
    shutil.copytree(sound, engine)
    attack.damage(engine)
    picture().save(tmp_path / "in.png")
    assert main(["--engine", str(engine), "--quiet", str(tmp_path / "in.png"), "--steps", "4"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert len(err) < 2000
    assert str(engine) in err
    assert re.search(attack.says, err)
    assert "internal error, please" not in err
    assert not (tmp_path / "in_x4.png").exists()


@pytest.mark.parametrize("text", JSON_TEXTS.values(), ids=JSON_TEXTS)
def test_kernels_json_is_refused(text: str, tmp_path: Path):
    (tmp_path / "kernels.json").write_text(text)
    with pytest.raises(EngineError, match=re.escape(str(tmp_path / "kernels.json"))):
        compiled_kernels.read(tmp_path)


@pytest.mark.parametrize("text", JSON_TEXTS.values(), ids=JSON_TEXTS)
def test_parts_json_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "decoder.parts.json"
    path.write_text(text)
    with pytest.raises(EngineError, match=f"{re.escape(str(path))}.*export the engine again"):
        read_parts(path)


@pytest.mark.parametrize("text", JSON_TEXTS.values(), ids=JSON_TEXTS)
def test_damaged_plan_json_is_ignored(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The plan is built again if its record is damaged."""
    key = plan_store.PlanKey("0" * 64, "rtx", "1.2", 89, 1)
    folder = tmp_path / key.name
    folder.mkdir()
    (folder / "graph.plan").write_bytes(b"plan")
    (folder / "plan.json").write_text(text)
    assert plan_store.read_plan(key, [tmp_path]) is None
    assert plan_store.list_plans(tmp_path) == []
    assert str(folder) in caplog.text
