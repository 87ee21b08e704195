"""Hostile weights are refused with a message that names the file; none of their code is run."""

from __future__ import annotations

import json
import pickle
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_checkpoints import CONFIGS, MARKER, PUBLISHED

from moesr.runtime.errors import MoesrError
from moesr.training.checkpoint import load_checkpoint
from moesr.training.importing.cli import main

COMMANDS = (
    "--experts FILE --decoder FILE",
    "--decoder FILE",
    "--stablesr FILE --cfw FILE --prediction v",
    "--stable-diffusion FILE --prediction v",
)
DEMO = Path(__file__).resolve().parents[2] / "training/demo_checkpoints/demo-x4"


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Let each attack add at most 4 GB of address space."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments.split()[0])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_refused(
    name: str, arguments: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    make, says = PUBLISHED[name]
    path = tmp_path / name
    path.write_bytes(make(path))
    words = [str(path) if word == "FILE" else word for word in arguments.split()]
    assert main([*words, "-o", str(tmp_path / "checkpoint"), "--quiet"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert str(path) in err
    assert re.search(says, err)
    assert "internal error" not in err
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_plain_unpickling_runs_the_command(tmp_path: Path):
    """The attack is real: plain unpickling runs the command that the import does not run."""
    make, _ = PUBLISHED["command.ckpt"]
    pickle.loads(make(tmp_path / "command.ckpt"))
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_configurations_are_refused(content: str | dict[str, object], tmp_path: Path):
    if isinstance(content, dict):
        values = json.loads((DEMO / "config.json").read_text())
        for place, value in content.items():
            *folders, last = place.split(".")
            inner = values
            for folder in folders:
                inner = inner[folder]
            inner[last] = value
        content = json.dumps(values)
    for file in DEMO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(MoesrError) as caught:
        load_checkpoint(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert len(text.splitlines()) == 1
    assert len(text) < 2000
