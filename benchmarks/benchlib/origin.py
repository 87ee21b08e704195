"""The origin of a figure (command, commit and machine), and work folders that belong to one commit."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from pathlib import Path

from benchlib.machine import machine_line

REPO = Path(__file__).resolve().parents[2]
CODE = ("runtime", "kernels", "training", "export", "benchmarks")
"""Folders whose modules can change a measurement."""


def origin_line() -> str:
    """Return the line with command, commit and machine that every page of results has."""
    return f"Command: `{command()}`. Commit: {commit()}. Machine: {machine_line()}."


def command() -> str:
    """Return the command line of this program as it would be typed in the project's folder."""
    program = Path(sys.argv[0])
    folder = "benchmarks/" if program.resolve().parent == REPO / "benchmarks" else ""
    return shlex.join(["python", folder + program.name, *sys.argv[1:]])


def commit(repo: Path = REPO) -> str:
    """Return the checked-out commit and a digest of uncommitted changes; without git, a digest of the code.

    Equal texts mean equal code: "86368a3b1f20", "86368a3b1f20 with changes 1c9a0d2e" or "code 77ab01c9".
    """
    head = _git(repo, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return f"code {_code_digest(repo)}"
    changed = _git(repo, "status", "--porcelain", "--", *CODE)
    return f"{head} with changes {_code_digest(repo)}" if changed else head


def work_folder(place: Path, **sizes: int) -> Path:
    """Return the folder below `place` for these sizes and this commit; others have other folders."""
    words = [f"{name}-{value}" for name, value in sizes.items()]
    return place / "-".join([*words, *commit().split()])


def _git(repo: Path, *words: str) -> str | None:
    """Return the output of a git command without the newline; None without git or a repository."""
    if not (repo / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(repo), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _code_digest(repo: Path) -> str:
    """Return eight hexadecimal digits of a hash of all modules in CODE."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (repo / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(repo)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]
