"""Files and directories are either complete or absent; leftovers of killed processes; inaccessible paths."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moesr.runtime.errors import EngineError, InputError, OutputError
from moesr.runtime.system import files


@pytest.fixture(autouse=True)
def _unswept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_swept", set())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def directory(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "manifest.json").write_text(text)
    return path


def make(target: Path, text: str, *, force: bool = True) -> None:
    with files.new_directory(target, force=force, marker="manifest.json") as new:
        (new / "manifest.json").write_text(text)


def test_file_appears_only_when_complete(tmp_path: Path):
    target = tmp_path / "new" / "a.bin"
    with files.write_atomically(target) as stream:
        stream.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert names(target.parent) == ["a.bin"]


@pytest.mark.parametrize(
    "raised", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_unfinished_file_leaves_nothing(tmp_path: Path, raised: BaseException):
    target = tmp_path / "a.bin"
    target.write_bytes(b"earlier")
    with pytest.raises(type(raised)), files.write_atomically(target) as stream:
        stream.write(b"half")
        raise raised
    assert target.read_bytes() == b"earlier"
    assert names(tmp_path) == ["a.bin"]


def test_directory_is_replaced_as_a_whole(tmp_path: Path):
    target = directory(tmp_path / "engine", "old")
    (target / "expert_9.onnx").touch()
    make(target, "new")
    assert names(target) == ["manifest.json"]
    assert (target / "manifest.json").read_text() == "new"
    assert names(tmp_path) == ["engine"]


@pytest.mark.parametrize("moment", [0, 1, 2], ids=["in the block", "between the renames", "after them"])
def test_ctrl_c_keeps_one_whole_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int):
    target = directory(tmp_path / "engine", "old")
    renames = []
    rename = Path.rename

    def interrupted(self: Path, place: Path) -> Path:
        done = rename(self, place)
        renames.append(place)
        if len(renames) == moment:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        files.new_directory(target, force=True, marker="manifest.json") as new,
    ):
        (new / "manifest.json").write_text("new")
        if moment == 0:
            raise KeyboardInterrupt
    assert (target / "manifest.json").read_text() == ("new" if moment == 2 else "old")
    assert names(tmp_path) == ["engine"]


def test_which_directories_may_be_replaced(tmp_path: Path):
    target = directory(tmp_path / "engine", "old")
    with pytest.raises(OutputError, match=r"exists; .* --force"):
        make(target, "new", force=False)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(OutputError, match="is not a directory"):
            make(tmp_path / name, "new")
    (tmp_path / "photos").mkdir()
    make(tmp_path / "photos", "new")  # an empty directory
    foreign = directory(tmp_path / "mine", "x")
    (foreign / "manifest.json").rename(foreign / "diary.txt")
    with pytest.raises(OutputError, match=r"no manifest\.json"):
        make(foreign, "new")
    (target / "diary.txt").touch()
    with pytest.raises(OutputError, match=r"other files \(diary\.txt\)"):
        files.check_replaceable(target, force=True, marker="manifest.json", only=r"manifest\.json")
    assert (target / "manifest.json").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from moesr.runtime.system import files

target, moment = Path(sys.argv[1]), sys.argv[2]
rename = Path.rename
def renamed(self, place):
    done = rename(self, place)
    if moment == "between":
        os.kill(os.getpid(), signal.SIGKILL)
    return done
Path.rename = renamed
if moment == "file":
    with files.write_atomically(target / "big.bin") as stream:
        stream.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
with files.new_directory(target, force=True, marker="manifest.json") as new:
    (new / "manifest.json").write_text("new")
    if moment == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["file", "writing", "between"])
def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, moment: str):
    target = directory(tmp_path / "engine", "old")
    result = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], check=False)
    assert result.returncode == -signal.SIGKILL
    place = target if moment == "file" else tmp_path
    assert any(name.startswith(".moesr-") for name in names(place))
    assert target.exists() == (moment != "between")
    with files.write_atomically(place / "next"):
        pass
    assert (target / "manifest.json").read_text() == "old"
    assert not any(name.startswith(".moesr-") for name in names(place))


def test_leftovers_of_running_processes_stay(tmp_path: Path):
    mine = files.scratch_path(tmp_path)
    elsewhere, aged = tmp_path / ".moesr-00000000-1-aa.tmp", tmp_path / ".moesr-00000000-2-aa.tmp"
    unknown = tmp_path / ".moesr-notes.tmp"
    for path in (mine, elsewhere, aged, unknown):
        path.touch()
    os.utime(aged, (0, 0))
    os.utime(unknown, (0, 0))
    files.sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, elsewhere, unknown}


def test_paths_that_cannot_be_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert files.examine(tmp_path / "absent") is None
    (tmp_path / "file").touch()
    assert files.examine(tmp_path / "file" / "below") is None
    with pytest.raises(InputError, match="File name too long; shorten it"):
        files.examine(tmp_path / ("n" * 256))
    with pytest.raises(EngineError, match="not a possible file name"):
        files.examine(tmp_path / "a\0b", EngineError)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="in a circle"):
        files.examine(tmp_path / "loop")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(InputError, match="Permission denied; check"):
        files.examine(tmp_path)


def test_check_writable_leaves_nothing_behind(tmp_path: Path):
    files.check_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 256)):
        with pytest.raises(OutputError, match=r"cannot be (written to|examined)"):
            files.check_writable(place)
    assert names(tmp_path) == ["file"]
