"""docs/structure.md lists every module of the code exactly once, and only folders that exist."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
TOPS = ("runtime", "export", "kernels", "training", "benchmarks")
PAGE = REPO / "docs/structure.md"


def modules() -> set[str]:
    """Return every module on disk except `__init__.py` files."""
    paths = (path for top in TOPS for path in (REPO / top).rglob("*.py"))
    return {str(path.relative_to(REPO)) for path in paths if path.name != "__init__.py"}


def listed() -> Counter[str]:
    """Count how often the page lists each module; a pattern such as `*/op.py` lists all matching files."""
    found: Counter[str] = Counter()
    folder = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## `([\w/]+/)`", line):
            folder = heading[1]
        elif row := re.match(r"\| `([\w*/.-]+\.py)` \| \S", line):
            names = sorted((REPO / folder).glob(row[1])) if "*" in row[1] else [REPO / folder / row[1]]
            found.update(str(path.relative_to(REPO)) for path in names)
    return found


def test_every_module_is_listed_once():
    found = listed()
    assert sorted(modules() - found.keys()) == [], "docs/structure.md lacks lines for these modules"
    assert [name for name, count in found.items() if count > 1] == []


def test_every_listed_module_exists():
    assert sorted(listed().keys() - modules()) == []


def test_every_folder_has_a_section():
    named = set(re.findall(r"^(?:## |\| )`([\w/]+/)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert [name for name in named if not (REPO / name).is_dir()] == []
    operators = {path.parent for path in (REPO / "kernels").glob("*/op.py")}
    folders = {(REPO / name).parent for name in modules()} - operators
    assert {f"{folder.relative_to(REPO)}/" for folder in folders} <= named
