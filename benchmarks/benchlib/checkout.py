"""Makes `moesr` importable from a checkout in which it is not installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def find_package() -> None:
    """Make `moesr` importable in this process and its children, even if it is not installed."""
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec("moesr.runtime"):
            return
    folder = Path(tempfile.mkdtemp(prefix="moesr-checkout-"))
    (folder / "moesr").symlink_to(ROOT, target_is_directory=True)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    sys.modules.pop("moesr", None)
    importlib.invalidate_caches()
