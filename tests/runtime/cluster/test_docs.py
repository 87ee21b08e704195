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

import cluster_rig
import pytest
from benchlib.local_store import free_port
from cluster_rig import SETTINGS, left_over, picture, stop, tree
from PIL import Image

from moesr.runtime.engine.locate import engine_directory

PAGE = Path(__file__).resolve().parents[3] / "docs/cluster.md"

PROGRAMS = """
cp() {
    sed -e "s|/var/lib/moesr|$PWD/state|" -e "s|num_cpus: 4|num_cpus: 0.5|" \\
        -e "s|8000|$SERVE_PORT|" -e "s|backend: auto|backend: onnxruntime, threads: 1|" "$1" > "$2"
}
serve() { "$PYTHON" -c 'from ray.serve.scripts import cli; cli()' "$@"; }
pip() { test "$1" = install; }
moesr-run() { "$PYTHON" -m moesr.runtime.cli.run "$@" --backend onnxruntime; }
ray() {
    case $1 in
        start)
            [[ $2 = --head ]] && set -- "$@" --include-dashboard false
            set -- "$@" --num-cpus 1 --object-store-memory 80000000
            ;;
        stop) "$PYTHON" -c 'import sys, cluster_rig; cluster_rig.stop(sys.argv[1])' "$RAY_TMPDIR"; return ;;
    esac
    "$PYTHON" -c 'import sys; from ray.scripts.scripts import main; sys.exit(main())' "$@"
}
"""
"""The programs of this environment, with limits for a small machine and an end for this cluster only."""


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def sockets() -> Iterator[str]:
    """A directory with a short path for Ray's sockets."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    yield folder
    left = left_over(folder)
    stop(folder)
    assert left == {}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_every_command_of_the_page_works(s3, tmp_path, sockets):
    for name in ("photos/2024/a.png", "photos/2024/deep/b.png"):
        picture(s3.folder / name, 16, 12)
    (s3.folder / "photos/2024/bad.png").write_bytes(b"no image")
    (s3.folder / "results").mkdir()
    shutil.copytree(engine_directory("demo-x8"), s3.folder / "engines/mine")
    picture(tmp_path / "scan.png", 16, 12)
    serve_port = str(free_port())
    variables = {
        "MOESR": str(PAGE.parents[1]),
        "SERVE_PORT": serve_port,
        "URL": f"http://127.0.0.1:{serve_port}",
        "PORT": str(free_port()),
        "HEAD": "127.0.0.1",
        "PYTHON": sys.executable,
        "RAY_TMPDIR": sockets,
        **SETTINGS,
        "PYTHONPATH": str(Path(cluster_rig.__file__).parent),
    }
    done = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", "\n".join([PROGRAMS, *blocks()])],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(done.stdout, done.stderr)
    assert done.stdout.count("Ray runtime started") == 2
    assert done.returncode == 0
    results = s3.folder / "results"
    assert tree(results / "2024") == ["a_x4.png", "deep/b_x4.png"]
    assert tree(results / "again") == ["a_x8.png"]
    assert tree(results / "scans") == ["scan_x4.png"]
    assert Image.open(tmp_path / "scan_x4.png").size == (64, 48)
    said = done.stderr
    assert said.count("2 done, 0 skipped, 1 failed") == 1 and "0 done, 2 skipped, 1 failed" in said, said
    assert '"error": "s3://photos/2024/bad.png: not an image' in done.stdout
