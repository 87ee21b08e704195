"""The kernels that the package ships: those of the sources, and the same bytes when built again."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from moesr.kernels import ship
from moesr.kernels.build import code_of
from moesr.kernels.plan import ARCHITECTURES
from moesr.runtime.devices import compiled_kernels, kernel_archive, kernel_search
from moesr.runtime.errors import UsageError

REPO = Path(ship.__file__).parents[1]


def repacked(directory: Path, change: Callable[[list[Path]], object]) -> None:
    """Change the files of an archive."""
    archive = directory / "sm_90.tar.gz"
    with tarfile.open(archive) as content:
        content.extractall(directory / "sm_90", filter="data")
    change(sorted((directory / "sm_90").iterdir()))
    ship.pack(directory)


def test_packing_the_same_files_gives_the_same_bytes(tmp_path):
    folder = shutil.copytree(kernel_search.SHIPPED, tmp_path / "kernels")
    repacked(folder, lambda files: [path.touch() for path in files])
    assert (folder / "sm_90.tar.gz").read_bytes() == (kernel_search.SHIPPED / "sm_90.tar.gz").read_bytes()


def test_shipped_kernels_are_those_of_the_sources():
    assert ship.faults() == []


def test_shipped_kernels_are_for_all_architectures_and_small():
    index = compiled_kernels.read(kernel_search.SHIPPED)
    assert index.architectures == tuple(f"sm_{arch}" for arch in ARCHITECTURES)
    size = sum(path.stat().st_size for path in kernel_search.SHIPPED.rglob("*") if path.is_file())
    assert size < 1_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: repacked(folder, lambda files: files[0].write_bytes(b"")), "is not what was built"),
        (lambda folder: repacked(folder, lambda files: files[0].unlink()), "sm_90/.*: is missing"),
        (lambda folder: (folder / "more.cubin").touch(), "more.cubin: is not in kernels.json"),
        (lambda folder: (folder / "ptx.tar.gz").unlink(), "ptx/.*: is missing"),
        (lambda folder: (folder / "ptx.tar.gz").write_bytes(b"no"), "ptx.tar.gz: it is damaged"),
        (lambda folder: (folder / "kernels.json").unlink(), "there are no kernels"),
    ],
    ids=["changed", "absent", "unknown", "no archive", "damaged archive", "no index"],
)
def test_files_that_differ_are_named(tmp_path, change, message):
    folder = shutil.copytree(kernel_search.SHIPPED, tmp_path / "kernels")
    change(folder)
    assert any(re.search(message, fault) for fault in ship.faults(folder))


def test_a_changed_source_is_named(monkeypatch):
    known = ship.source_hash
    monkeypatch.setattr(ship, "source_hash", lambda op: "0" if op == "tile_blend" else known(op))
    assert ship.faults() == ["tile_blend: kernel.py has changed"]


def test_the_hash_of_a_source_ignores_its_prose():
    source = b'"""Doc."""\nimport triton\n\n\ndef f(a):  # why\n    """Doc."""\n    return "text" + a\n'
    assert code_of(source) == code_of(b'import triton\ndef f(a):\n    "Other."\n    return "text" + a\n')
    assert code_of(source) != code_of(source.replace(b'"text"', b'"test"'))
    assert code_of(source) != code_of(source.replace(b"+ a", b"- a"))


def test_a_changed_tiling_is_named(monkeypatch):
    from moesr.kernels.tile_gather import op

    monkeypatch.setattr(op, "BLOCK_W", 32)
    found = ship.faults()
    assert any("is missing" in fault for fault in found) and any("is not in the reg" in f for f in found)


def test_another_toolkit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "TOOLKIT", "13.4")
    assert "built with Triton 3.6.0 and CUDA 12.9, not with 3.6.0 and 13.4" in ship.faults()
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.5.0")
    with pytest.raises(UsageError, match=r"built with Triton 3.6.0, and this is 3.5.0; .*triton==3\.6\.0"):
        ship.ship(tmp_path / "kernels")


@pytest.mark.slow
def test_built_again_they_are_the_same_bytes(tmp_path):
    triton = pytest.importorskip("triton")
    if triton.__version__ != ship.TRITON:
        pytest.skip(f"the shipped kernels are built with Triton {ship.TRITON}")
    ship.ship(tmp_path / "kernels")
    made, shipped = tmp_path / "kernels", kernel_search.SHIPPED
    assert (made / "kernels.json").read_bytes() == (shipped / "kernels.json").read_bytes()
    for path in made.glob("*.tar.gz"):
        files = [kernel_archive.read(archive, 1 << 24) for archive in (path, shipped / path.name)]
        assert files[0] == files[1], path.name


@pytest.mark.slow
def test_a_wheel_holds_the_shipped_kernels(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        REPO,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"moesr/runtime/kernels/{path.name}" for path in kernel_search.SHIPPED.iterdir()} <= names
