"""Images through pipes: standard input and output carry images, and messages go to stderr only."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine
from PIL import Image

from moesr.runtime.cli.run import main
from moesr.runtime.images import provenance

RNG = np.random.default_rng(31)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=2)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(RNG.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    return path


def run(engine: Path, command: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command in which `moesr` stands for moesr-run with the engine."""
    program = f"'{sys.executable}' -m moesr.runtime.cli.run --backend onnxruntime --engine '{engine}'"
    words = command.replace("moesr", program)
    return subprocess.run(["bash", "-c", words], capture_output=True, check=False, cwd=folder, timeout=120)


@pytest.mark.parametrize(
    "command",
    [
        "moesr - -o - < a.png",
        "cat a.png | moesr - -o -",
        "cat a.png | moesr -",
        "cat a.png | moesr /dev/stdin -o /dev/stdout",
        "moesr /dev/fd/0 < a.png",
        "moesr <(cat a.png)",
        "moesr a.png -o -",
        "moesr a.png -o - > b.png; cat b.png",
    ],
)
def test_image_from_stdin_to_stdout(engine, picture, command):
    result = run(engine, command, picture.parent)
    assert result.returncode == 0, result.stderr
    image = Image.open(io.BytesIO(result.stdout))
    assert (image.format, image.size) == ("PNG", (48, 36))
    assert b"backend onnxruntime" in result.stderr
    left = sorted(path.name for path in picture.parent.iterdir())
    assert left in (["a.png"], ["a.png", "b.png"])
    assert main(["--engine", str(engine), str(picture), "--quiet"]) == 0
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(picture.with_name("a_x4.png"))))


def test_standard_input_with_a_named_result(engine, picture):
    result = run(engine, "moesr - -o out/ < a.png && moesr - -o b.webp < a.png", picture.parent)
    assert result.returncode == 0, result.stderr
    assert b" -> out/stdin_x4.png\n" in result.stdout
    record = provenance.read(picture.parent / "out" / "stdin_x4.png")
    assert record and record.source == "stdin"
    assert Image.open(picture.parent / "b.webp").size == (48, 36)


def test_format_of_standard_output(engine, picture):
    result = run(engine, "moesr - --format jpg --quality 50 --scale 2 < a.png", picture.parent)
    image = Image.open(io.BytesIO(result.stdout))
    assert (image.format, image.size) == ("JPEG", (24, 18))


REFUSED = {
    "empty": ("moesr - < /dev/null", 1, b"standard input: is empty"),
    "closed": ("moesr - <&-", 1, b"standard input: is empty"),
    "no image": ("echo text | moesr -", 1, b"not an image"),
    "several": ("moesr - a.png < a.png", 2, b"one image only, but there are 2 inputs"),
    "twice": ("moesr a.png a.png -o -", 2, b"one image only"),
    "directory": ("moesr . -o -", 2, b"a directory has several results"),
    "full": ("moesr a.png -o - > /dev/full", 1, b"standard output: cannot be written to"),
}


@pytest.mark.parametrize(("command", "code", "message"), REFUSED.values(), ids=REFUSED)
def test_pipes_that_are_refused(engine, picture, command, code, message):
    result = run(engine, command, picture.parent)
    assert result.returncode == code, result.stderr
    assert message in result.stderr and b"Traceback" not in result.stderr and b"internal" not in result.stderr
    assert result.stdout == b""


def test_image_to_a_terminal_is_refused(engine, picture):
    pty = pytest.importorskip("pty")
    primary, secondary = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "moesr.runtime.cli.run",
        "--engine",
        str(engine),
        str(picture),
        "-o",
        "-",
    ]
    result = subprocess.run(command, stdout=secondary, stderr=subprocess.PIPE, check=False)
    os.close(secondary), os.close(primary)
    assert result.returncode == 2 and b"cannot be written to a terminal" in result.stderr
