"""The runtime imports without torch, onnx and triton, and none of its modules imports them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moesr.runtime.errors

RUNTIME = Path(moesr.runtime.errors.__file__).parent
MODULES = sorted(
    ".".join(("moesr.runtime", *path.relative_to(RUNTIME).with_suffix("").parts)).removesuffix(".__init__")
    for path in RUNTIME.rglob("*.py")
    if "-" not in path.name  # hooks of PyInstaller, which are run by their file names
)
BLOCKED_IMPORT = """
import importlib, sys
for name in ("torch", "onnx", "triton", "moesr.export", "moesr.training", "moesr.kernels"):
    sys.modules[name] = None  # makes `import name` raise ImportError
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def _run(*modules: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED_IMPORT, *modules]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_all_runtime_modules_import_without_torch():
    assert "moesr.runtime.backends.ort" in MODULES
    result = _run(*MODULES)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["torch", "onnx", "triton", "moesr.export"])
def test_blocked_modules_cannot_be_imported(name: str):
    result = _run(name)
    assert result.returncode != 0
    assert "ImportError" in result.stderr or "ModuleNotFoundError" in result.stderr
