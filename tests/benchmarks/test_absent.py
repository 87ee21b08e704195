"""If a benchmark's packages are missing, its message says how to install them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "parse_args(" in path.read_text())


@pytest.mark.parametrize("program", PROGRAMS)
def test_message_of_a_missing_package_names_the_cure(program):
    # only the standard library is found
    bare = [sys.executable, "-S", str(BENCHMARKS / f"{program}.py"), "--help"]
    found = subprocess.run(bare, capture_output=True, text=True)
    if found.returncode == 0:  # it needs the standard library alone
        assert found.stdout.startswith("usage: ")
        return
    assert found.returncode == 1
    assert found.stderr.startswith(f"{program}: ") and found.stderr.count("\n") == 1
    assert "is not installed; pip install 'moesr[bench]'" in found.stderr
