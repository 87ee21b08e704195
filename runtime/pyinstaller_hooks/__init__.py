"""Hooks with which PyInstaller finds the backends and the bundled engines; it finds the hooks by itself."""

from __future__ import annotations

from pathlib import Path


def directories() -> list[str]:
    """Return the directories of hooks, for PyInstaller's entry point `hook-dirs`."""
    return [str(Path(__file__).parent)]
