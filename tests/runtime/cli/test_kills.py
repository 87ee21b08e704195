"""Runs that are killed at random moments leave no partial file and lose no result (short form)."""

from __future__ import annotations

from pathlib import Path

import kill_runs
from engines import build_engine


def test_killed_runs_continue(tmp_path: Path):
    """The long form is: python tests/tools/kill_runs.py --kills 100."""
    engine = build_engine(tmp_path / "engine", steps=2)
    assert kill_runs.check(str(engine), kills=4, images=6, seed=3, folder=tmp_path) == []
