"""The command line: names of results, folders, exit codes, messages, and files that stay untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine
from PIL import Image

from moesr.runtime.cli import doctor
from moesr.runtime.cli.run import main
from moesr.runtime.system import memory

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a directory with a.png, b.jpg and a text file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    picture().save(folder / "a.png")
    picture().save(folder / "b.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


def picture(width: int = 12, height: int = 9) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def run(engine: Path, *arguments: object) -> int:
    return main(["--engine", str(engine), *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_image_beside_its_input(engine: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    assert run(engine, photos / "a.png") == 0
    result = photos / "a_x4.png"
    assert Image.open(result).size == (48, 36)
    out, err = capsys.readouterr()
    assert out == f"{photos / 'a.png'} -> {result}\n"
    assert "backend onnxruntime" in err
    assert "9/9" not in out


def test_progress_on_stderr_unless_quiet(engine: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    assert run(engine, photos / "a.png") == 0
    err = capsys.readouterr().err
    assert "1/1 a.png: 100%" in err
    assert "/3" not in err  # tiles of different cost are not counted together
    assert run(engine, photos / "b.jpg", "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("output", "result"),
    [
        ("sr.webp", "sr.webp"),
        ("new/sr.JPG", "new/sr.JPG"),
        ("folder/", "folder/a_x4.png"),
        ("newdir", "newdir/a_x4.png"),
    ],
)
def test_output_of_one_image(engine: Path, photos: Path, tmp_path: Path, output: str, result: str):
    assert run(engine, photos / "a.png", "-o", f"{tmp_path}/{output}") == 0
    assert Image.open(tmp_path / result).size == (48, 36)


def test_folder_run_resumes(engine: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    assert run(engine, photos) == 0
    assert names(photos) == ["a.png", "a_x4.png", "b.jpg", "b_x4.png", "notes.txt"]
    (photos / "a_x4.png").unlink()
    before = (photos / "b_x4.png").stat().st_mtime_ns
    capsys.readouterr()
    assert run(engine, photos) == 0
    out, err = capsys.readouterr()
    assert out.count("->") == 1
    assert "b.jpg: skipped" in err
    assert (photos / "b_x4.png").stat().st_mtime_ns == before
    assert run(engine, photos, "--force") == 0
    assert (photos / "b_x4.png").stat().st_mtime_ns != before
    assert len(names(photos)) == 5


def test_bad_inputs_do_not_stop_the_others(
    engine: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "empty.png").touch()
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    assert run(engine, photos, tmp_path / "absent.png", "-o", tmp_path / "out") == 1
    assert names(tmp_path / "out") == ["a_x4.png", "b_x4.png"]
    err = capsys.readouterr().err
    for text in ("empty.png: is empty", "broken.png: truncated", "absent.png: no such file"):
        assert text in err
    assert "Traceback" not in err


USAGE = {
    "page to stdout": (["-o", "-", "--compare"], "--compare writes a page beside the result"),
    "suffix": (["--suffix", "a/b"], "--suffix is 'a/b'"),
    "format and name": (["-o", "b.webp", "--format", "jpg"], "--format is jpg, but -o names a .webp file"),
    "quality of png": (["--quality", "80"], "--quality has no meaning for png"),
    "quality": (["--format", "jpg", "--quality", "0"], "--quality is 0"),
    "unknown suffix": (["-o", "x.xyz"], "cannot write .xyz"),
    "one name for several": (["b.jpg", "-o", "out.png"], "name a directory, such as out/"),
    "one name for a directory": ([".", "-o", "out.TIF"], "name a directory, such as out/"),
    "steps": (["--steps", "0"], "steps is 0, expected a whole number from 1 to 1000"),
    "steps beyond": (["--steps", "1001"], "steps is 1001"),
    "fidelity": (["--fidelity", "2"], "fidelity is 2.0"),
    "seed": (["--seed", "-1"], "seed is -1"),
    "threads": (["--threads", "0"], "threads is 0"),
    "too many threads": (["--threads", "100000"], "threads is 100000, expected a whole number from 1 to"),
    "device": (["--device", "cpu:7"], "device is 'cpu:7'"),
}


@pytest.mark.parametrize(("options", "message"), USAGE.values(), ids=USAGE)
def test_usage_errors(
    engine: Path,
    photos: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(photos)
    assert run(engine, "a.png", *options) == 2
    assert message in capsys.readouterr().err
    assert names(photos) == ["a.png", "b.jpg", "notes.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.png", "--size", "x"],
        ["a.png", "--scale", "1000"],
        ["a.png", "--sampler", "euler"],
        ["a.png", "--color-fix", "sepia"],
        [""],
        ["a.png", "-o", ""],
    ],
)
def test_arguments_refused_by_argparse(engine: Path, arguments: list[str]):
    with pytest.raises(SystemExit) as caught:
        run(engine, *arguments)
    assert caught.value.code == 2


def test_folder_without_images(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    assert run(engine, tmp_path / "empty") == 2
    assert "no images in" in capsys.readouterr().err


def _newer_schema(engine: Path) -> None:
    path = engine / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))


ENGINES = {
    "missing": (lambda e: e.rename(e.with_name("moved")), "no such engine directory"),
    "damaged": (lambda e: (e / "decoder.onnx").write_bytes(b"x"), "decoder.onnx: damaged"),
    "foreign": (lambda e: (e / "manifest.json").unlink(), "not an engine directory"),
    "newer": (_newer_schema, "schema 99, this moesr reads schema 2"),
}


@pytest.mark.parametrize("program", ["run", "doctor"])
@pytest.mark.parametrize(("harm", "message"), ENGINES.values(), ids=ENGINES)
def test_unusable_engine(tmp_path, photos, harm, message, program, capsys):
    engine = build_engine(tmp_path / "engine")
    harm(engine)
    code = run(engine, photos / "a.png") if program == "run" else doctor.main(["--engine", str(engine)])
    assert code == 3
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert names(photos) == ["a.png", "b.jpg", "notes.txt"]


def test_damaged_graph_is_not_reported_as_out_of_memory(tmp_path, photos, capsys):
    for name in ("allocated-engine", "failed to allocate memory", "out of memory"):
        engine = build_engine(tmp_path / name)
        for graph in engine.glob("expert_*.onnx"):
            graph.write_bytes(graph.read_bytes()[:100])
        assert run(engine, photos / "a.png", "--no-verify", "--no-cache") == 3
        assert "out of memory (" not in capsys.readouterr().err


def test_nan_in_one_image_does_not_stop_the_others(
    engine: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from moesr.runtime import NonFiniteError
    from moesr.runtime.loop import job

    calls = []

    def check_finite(_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise NonFiniteError("expert_3.onnx: NaN")

    monkeypatch.setattr(job.Job, "check_finite", check_finite)
    assert run(engine, photos) == 3
    assert names(photos) == ["a.png", "b.jpg", "b_x4.png", "notes.txt"]
    assert "a.png: expert_3.onnx: NaN" in capsys.readouterr().err


def test_out_of_memory(
    engine: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert run(engine, photos / "a.png") == 4
    assert "needs about" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 4, "out of memory"),
        (RuntimeError("surprise"), 1, "internal error, please report it: RuntimeError: surprise"),
    ],
    ids=["interrupt", "memory", "bug"],
)
def test_every_exception_becomes_one_line(engine, photos, raised, code, message, capsys, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("moesr.runtime.images.reading.load", fail)
    if isinstance(raised, MemoryError):
        monkeypatch.setattr("moesr.runtime.cli.batch.run", fail)
    assert run(engine, photos / "a.png") == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert names(photos) == ["a.png", "b.jpg", "notes.txt"]


def test_closed_pipe(engine: Path, photos: Path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "moesr.runtime.cli.run", "--engine", str(engine), str(photos / "a.png")]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert (photos / "a_x4.png").exists()


def test_options_equal_those_of_the_upscaler(engine: Path, photos: Path):
    from moesr.runtime import Upscaler

    options = [
        "--steps",
        "3",
        "--sampler",
        "ddim",
        "--seed",
        "7",
        "--color-fix",
        "wavelet",
        "--fidelity",
        "0.5",
    ]
    assert run(engine, photos / "a.png", *options) == 0
    with Upscaler(engine) as up:
        settings = {"steps": 3, "sampler": "ddim", "seed": 7, "color_fix": "wavelet", "fidelity": 0.5}
        want = up(Image.open(photos / "a.png"), **settings)
    np.testing.assert_array_equal(np.asarray(Image.open(photos / "a_x4.png")), np.asarray(want))


def test_doctor(engine: Path, capsys: pytest.CaptureFixture[str]):
    assert doctor.main(["--engine", str(engine)]) == 0
    out = capsys.readouterr().out
    for text in ("moesr ", "backend onnxruntime", "hashes agree", "parity decoder", "one step and a decode"):
        assert text in out


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for text in ("default: 42", "default: adain", "the engine's", "default: auto", "Exit codes"):
        assert text in out


def test_few_imports_before_the_guard():
    """Ctrl-C during these imports would print a traceback, because the guard is not in place yet."""
    script = "import sys, moesr.runtime.cli.run; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"hashlib", "secrets", "numpy", "PIL", "tempfile", "tqdm"} & set(result.stdout.split())
