"""Hashes of large files are remembered until the file is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from engines import build_engine

from moesr.runtime import EngineError
from moesr.runtime.cli import doctor
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.system import file_hashes, files

OLD_NS = 10**18


@pytest.fixture(autouse=True)
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a cache for this test alone, in which small files count as large and settle at once."""
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "LARGE", 4)
    monkeypatch.setattr(file_hashes, "SETTLED_NS", 0)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the names of files whose content was read."""
    names, sha256_of = [], files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: names.append(path.name) or sha256_of(path))
    return names


def test_file_is_read_once(tmp_path: Path, hashed: list[str]):
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    assert file_hashes.sha256_of(path) == file_hashes.sha256_of(path) == files.sha256_of(path)
    assert hashed == ["weights"] * 2  # the second is read by this test
    assert file_hashes.sha256_of(path, anew=True) and len(hashed) == 3


@pytest.mark.parametrize("keep_times", [False, True])
def test_touched_file_is_read_again(tmp_path: Path, hashed: list[str], keep_times: bool):
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    os.utime(path, ns=(OLD_NS, OLD_NS))
    first = file_hashes.sha256_of(path)
    path.write_bytes(b"weightS")
    if keep_times:
        os.utime(path, ns=(OLD_NS, OLD_NS))  # the time of the change itself (ctime) cannot be set
    assert file_hashes.sha256_of(path) != first


def test_small_and_unsettled_files_are_not_remembered(tmp_path: Path, hashed: list[str], monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    file_hashes.sha256_of(path), file_hashes.sha256_of(path)
    path.write_bytes(b"weights")
    monkeypatch.setattr(file_hashes, "SETTLED_NS", 10**12)
    file_hashes.sha256_of(path), file_hashes.sha256_of(path)
    assert len(hashed) == 4 and not (tmp_path / "cache").exists()


def test_damaged_cache_does_not_change_a_hash(tmp_path: Path, hashed: list[str]):
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    want = file_hashes.sha256_of(path)
    (kept,) = (tmp_path / "cache" / file_hashes.FOLDER).iterdir()
    for text in ("", "[]", '{"sha256": 1}', kept.read_text()[:40]):
        kept.write_text(text)
        assert file_hashes.sha256_of(path) == want


def test_engine_is_hashed_once_and_again_by_the_doctor(tmp_path: Path, hashed: list[str], capsys):
    engine = build_engine(tmp_path / "engine", experts=2)
    hashed.clear()
    read_manifest(engine), read_manifest(engine)
    assert sorted(hashed) == ["decoder.onnx", "expert_0.onnx", "expert_1.onnx"]
    hashed.clear()
    assert doctor.main(["--engine", str(engine)]) == 0
    assert len(hashed) == 3
    (engine / "expert_0.onnx").write_bytes((engine / "expert_0.onnx").read_bytes() + b" ")
    with pytest.raises(EngineError, match="damaged or replaced"):
        read_manifest(engine)
