"""Hooks with which PyInstaller finds the backends and the bundled engines; it looks here by itself."""

from __future__ import annotations

from pathlib import Path


def directories() -> list[str]:
    """The directories of hooks, as PyInstaller's entry point `hook-dirs` expects them."""
    return [str(Path(__file__).parent)]
