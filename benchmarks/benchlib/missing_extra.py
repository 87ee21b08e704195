"""Imported first by programs: what a missing package is installed with is told, in place of a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python calls with an exception that nobody caught."""
    if not isinstance(error, ModuleNotFoundError):
        sys.__excepthook__(kind, error, trace)
        return
    program = Path(sys.argv[0]).stem
    print(f"{program}: {error.name} is not installed; pip install 'moesr[bench]'", file=sys.stderr)


sys.excepthook = tell
