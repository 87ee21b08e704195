"""Each hostile image gets its exit code and message, and the other inputs are still upscaled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from engines import build_engine
from hostile_images import ACCEPTED, REFUSED, Attack, picture
from PIL import Image

from moesr.runtime.cli.run import main


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=1)


def run(engine: Path, *arguments: object) -> int:
    return main(["--engine", str(engine), "--quiet", *map(str, arguments)])


@pytest.mark.parametrize("attack", [pytest.param(a, id=name) for name, a in REFUSED.items()])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused_with_a_reason(
    attack: Attack, engine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    attack.make(tmp_path / attack.name)
    assert run(engine, tmp_path / attack.name) == attack.code
    out, err = capfd.readouterr()
    assert out == ""
    *warnings, error = err.splitlines()
    assert all(line.startswith("moesr-run: warning: ") for line in warnings)
    assert error.startswith("moesr-run: error: ")
    assert re.search(attack.says, error)
    assert "internal error, please" not in err
    assert r"\n " not in error  # escaped line breaks would show a message of several lines
    assert [path.name for path in tmp_path.iterdir()] == [attack.name]


@pytest.mark.parametrize("attack", [pytest.param(a, id=name) for name, a in ACCEPTED.items()])
def test_upscaled_and_recognized_by_a_second_run(
    attack: Attack, engine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The result can be read, and a second run recognizes it as finished."""
    source = tmp_path / "in" / attack.name
    source.parent.mkdir()
    attack.make(source)
    for output in attack.results:
        for _ in range(2):
            assert run(engine, source, "-o", tmp_path / output) == 0
        lines = capfd.readouterr()
        assert lines.out.count("->") == 1
        assert lines.out.count("\n") == 1
        assert "\x1b" not in lines.out + lines.err
        with Image.open(tmp_path / output) as result:
            result.load()
            assert result.size == (52, 36)


def test_other_images_of_the_folder_succeed(engine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder, results = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, attack in REFUSED.items():
        attack.make(folder / f"{name}{Path(attack.name).suffix}")
    for name, attack in ACCEPTED.items():
        attack.make(folder / f"{name}{Path(attack.name).suffix}")
    picture().save(folder / "zz_last.png")
    assert run(engine, folder, "-o", f"{results}/") == 1
    made = {path.name for path in results.iterdir()}
    assert made == {f"{name}_x4.png" for name in (*ACCEPTED, "zz_last")}
    assert "internal error, please" not in capfd.readouterr().err
