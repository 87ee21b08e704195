"""The commands of docs/cluster.md, run as they stand there, on one machine with a local store."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_rig import free_port, picture, ray_processes, tree

from moesr.runtime.engine.locate import engine_directory

PAGE = Path(__file__).resolve().parents[3] / "docs/cluster.md"

PROGRAMS = {  # the programs of this environment, and limits for a small machine
    "pip": 'test "$1" = install',
    "moesr-run": f'"{sys.executable}" -m moesr.runtime.cli.run "$@" --backend onnxruntime',
    "ray": 'case $1 in start) set -- "$@" --num-cpus 1 --object-store-memory 80000000 '
    '--include-dashboard false;; esac; "$PYTHON" -c '
    "'import sys; from ray.scripts.scripts import main; sys.exit(main())' \"$@\"",
}


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def sockets() -> Iterator[str]:
    """A directory with a short path for Ray's sockets."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    yield folder
    assert ray_processes(folder) == []
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_every_command_of_the_page_works(s3, tmp_path, sockets):
    for name in ("photos/2024/a.png", "photos/2024/deep/b.png"):
        picture(s3.folder / name, 16, 12)
    (s3.folder / "photos/2024/bad.png").write_bytes(b"no image")
    (s3.folder / "results").mkdir()
    shutil.copytree(engine_directory("demo-x8"), s3.folder / "engines/mine")
    variables = {
        "PORT": str(free_port()),
        "HEAD": "127.0.0.1",
        "PYTHON": sys.executable,
        "RAY_TMPDIR": sockets,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    functions = "\n".join(f"{name}() {{ {body}; }}" for name, body in PROGRAMS.items())
    done = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", "\n".join([functions, *blocks()])],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = s3.folder / "results"
    assert tree(results / "2024") == ["a_x4.png", "deep/b_x4.png"]
    assert tree(results / "again") == ["a_x8.png"]
    said = done.stderr
    assert said.count("2 done, 0 skipped, 1 failed") == 1 and "0 done, 2 skipped, 1 failed" in said, said
    assert '"error": "s3://photos/2024/bad.png: not an image' in done.stdout
