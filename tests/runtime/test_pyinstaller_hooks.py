"""The hook for PyInstaller is found by its entry point and is complete.

The build itself was tried by hand.
"""

from __future__ import annotations

import importlib
import pkgutil
import runpy
import sys
import tomllib
import types
from pathlib import Path

import moesr.runtime
from moesr.runtime.backends.selection import BACKENDS

REPO = Path(__file__).resolve().parents[2]


def collect_submodules(package: str, filter) -> list[str]:
    found = pkgutil.walk_packages(moesr.runtime.__path__, f"{package}.")
    return [module.name for module in found if filter(module.name)]


def test_hook_lists_modules_data_and_metadata(monkeypatch):
    """Functions replace those of PyInstaller, which is not installed for tests."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["pyinstaller40"]["hook-dirs"].partition(":")
    (folder,) = getattr(importlib.import_module(module), name)()
    hooks = types.ModuleType("PyInstaller.utils.hooks")
    hooks.collect_submodules = collect_submodules  # type: ignore[attr-defined]
    hooks.collect_data_files = lambda package: [(f"{package}/demo_engines", package)]  # type: ignore[attr-defined]
    hooks.copy_metadata = lambda package: [(f"{package}.dist-info", ".")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "PyInstaller", types.ModuleType("PyInstaller"))
    monkeypatch.setitem(sys.modules, "PyInstaller.utils", types.ModuleType("PyInstaller.utils"))
    monkeypatch.setitem(sys.modules, "PyInstaller.utils.hooks", hooks)
    values = runpy.run_path(str(Path(folder) / "hook-moesr.runtime.py"))
    assert set(BACKENDS.values()) <= set(values["hiddenimports"])
    assert not any("pyinstaller" in name for name in values["hiddenimports"])
    assert len(values["datas"]) == 2
