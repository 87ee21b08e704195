"""Every result names command, commit and machine; intermediate files are kept per size and commit."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchlib import origin

RESULTS = origin.REPO / "benchmarks" / "results"
PAGES = sorted(RESULTS.rglob("*.md"))


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A git repository with one module."""
    module = tmp_path / "repo" / "runtime" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text("VALUE = 1\n")
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        names = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        subprocess.run(["git", *names, *words], cwd=tmp_path / "repo", check=True)
    return tmp_path / "repo"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(RESULTS)))
def test_every_results_page_names_command_commit_and_machine(page: Path):
    text = page.read_text(encoding="utf-8")
    assert re.search(r"^Command: .+\. Commit: (code )?[0-9a-f]{7,}.*\. Machine: .+\.", text, re.MULTILINE)


def test_line_of_command_commit_and_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(origin.REPO / "benchmarks" / "flops.py"), "--name", "a b"])
    assert origin.origin_line().startswith("Command: `python benchmarks/flops.py --name 'a b'`. Commit: ")


def test_commit_marks_uncommitted_changes(repo: Path):
    module = repo / "runtime" / "module.py"
    found = [origin.commit(repo)]
    for value in (2, 3):
        module.write_text(f"VALUE = {value}\n")
        found.append(origin.commit(repo))
    assert re.fullmatch(r"[0-9a-f]{12}", found[0])
    assert all(text.startswith(f"{found[0]} with changes ") for text in found[1:])
    assert len(set(found)) == 3
    module.write_text("VALUE = 1\n")
    assert origin.commit(repo) == found[0]
    shutil.rmtree(repo / ".git")
    assert re.fullmatch(r"code [0-9a-f]{8}", origin.commit(repo))


def test_work_folder_depends_on_sizes_and_commit(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(origin, "commit", lambda: "0123456789ab with changes 01234567")
    first = origin.work_folder(tmp_path, width=160, tile=512)
    assert first == tmp_path / "width-160-tile-512-0123456789ab-with-changes-01234567"
    assert origin.work_folder(tmp_path, width=32, tile=512) != first
    monkeypatch.setattr(origin, "commit", lambda: "ba9876543210")
    assert origin.work_folder(tmp_path, width=160, tile=512) != first
