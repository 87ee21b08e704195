"""Replace the traceback of a missing package by a message; programs import this module first."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print how to install a missing package; other uncaught exceptions get Python's traceback."""
    if not isinstance(error, ModuleNotFoundError):
        sys.__excepthook__(kind, error, trace)
        return
    program = Path(sys.argv[0]).stem
    print(f"{program}: {error.name} is not installed; pip install 'moesr[bench]'", file=sys.stderr)


sys.excepthook = tell
