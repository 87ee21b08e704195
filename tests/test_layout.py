"""The layout of the code: packages on disk and in `pyproject.toml`, levels of imports, no circles."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
TOPS = ("runtime", "kernels", "training", "export")

RUNTIME = {
    "errors": (),
    "sampling": (),
    "pyinstaller_hooks": (),
    "options": ("errors",),
    "system": ("errors",),
    "images": ("errors", "system"),
    "engine": ("errors", "images", "options", "sampling", "system"),
    "devices": ("engine", "errors", "images", "sampling", "system"),
    "backends": ("devices", "engine", "errors", "options", "system"),
    "loop": ("devices", "engine", "errors", "images", "options", "sampling", "system"),
    "opened": ("backends", "devices", "engine", "loop", "system"),
    "upscaler": ("backends", "engine", "errors", "loop", "opened", "options"),
    "autoencoder": ("engine", "errors", "loop", "opened"),
    "cli": (
        *("backends", "devices", "engine", "errors", "images", "loop", "options", "sampling", "system"),
        "autoencoder",
        "upscaler",
    ),
    "integrations": ("autoencoder", "engine", "errors", "images", "options", "sampling", "upscaler"),
    "serve": ("cli", "engine", "errors", "images", "loop", "sampling", "system", "upscaler"),
    "cluster": (
        *("backends", "cli", "devices", "engine", "errors", "images", "loop", "opened", "serve", "system"),
        "upscaler",
    ),
}
"""The packages that each package of the runtime imports, lowest level first: imports name earlier entries."""

PARTS = {
    "runtime": (),
    "kernels": ("runtime",),
    "training": ("kernels", "runtime"),
    "export": ("kernels", "runtime", "training"),
}
"""The packages that each top-level package imports, lowest level first."""


def files(*tops: str) -> Iterator[Path]:
    return (path for top in tops for path in sorted((REPO / top).rglob("*.py")))


def name_of(path: Path) -> str:
    """Return the dotted name of a module without the leading `moesr`."""
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports() -> dict[str, set[str]]:
    """Return the project's modules that each module imports, also inside functions and for type checkers."""
    names = {name_of(path) for path in files(*TOPS)}
    found: dict[str, set[str]] = {}
    for path in files(*TOPS):
        found[name_of(path)] = targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                inside = [f"{module}.{alias.name}" for alias in node.names]
                wanted = [name if name.removeprefix("moesr.") in names else module for name in inside]
            else:
                continue
            targets |= {name.removeprefix("moesr.") for name in wanted if name.startswith("moesr.")}
        assert targets <= names, targets - names
    return found


def arrows(depth: int, top: str = "") -> dict[str, set[str]]:
    """Return the imports between packages of one depth below `top`."""
    found: dict[str, set[str]] = {}
    for module, targets in imports().items():
        # runtime/__init__.py only re-exports the public names
        if not module.startswith(top) or module == "runtime":
            continue
        place = module.split(".")[depth]
        found.setdefault(place, set())
        ends = {target.split(".")[depth] for target in targets if target.startswith(top)}
        found[place] |= ends - {place}
    return found


def test_pyproject_lists_the_packages_on_disk():
    setuptools = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {f"moesr.{name_of(p)}" for p in files(*TOPS) if p.name == "__init__.py"}
    folders = {f"moesr.{name_of(p / '__init__.py')}" for p in {f.parent for f in files(*TOPS)}}
    assert folders == on_disk, "a folder with modules has no __init__.py"
    assert set(setuptools["packages"]) == on_disk
    assert setuptools["package-dir"] == {n: n.removeprefix("moesr.").replace(".", "/") for n in on_disk}


@pytest.mark.parametrize(
    ("table", "depth", "top"), [(RUNTIME, 1, "runtime."), (PARTS, 0, "")], ids=["runtime", "parts"]
)
def test_table_of_levels_equals_the_imports(table, depth, top):
    found = arrows(depth, top)
    assert {place: set(targets) for place, targets in table.items()} == found
    order = list(table)
    upwards = {(a, b) for a, targets in found.items() for b in targets if order.index(b) > order.index(a)}
    assert not upwards


def test_no_module_imports_itself_in_a_circle():
    graph = {module: set(targets) for module, targets in imports().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_package_imports_itself_in_a_circle():
    for top in TOPS:
        try:
            TopologicalSorter(arrows(1, f"{top}.")).prepare()
        except CycleError as error:
            pytest.fail(f"{top}: " + " -> ".join(error.args[1]))
