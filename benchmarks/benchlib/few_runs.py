"""`moesr-run` with ONNX Runtime, in which each graph runs twice and then leaves its last output as it is.

Memory is that of a whole run, because every graph has taken its working memory and everything around the
graphs is done for all tiles. Time and pixels are not those of a whole run.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

from moesr.runtime.backends.ort import OnnxSession
from moesr.runtime.cli.run import main

RUNS = 2
"""Runs of each graph."""

_runs: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_enqueue = OnnxSession.enqueue


def _enqueue_a_few(self: OnnxSession, batch: int) -> None:
    _runs[self] = _runs.get(self, 0) + 1
    if _runs[self] <= RUNS:
        _enqueue(self, batch)


if __name__ == "__main__":
    OnnxSession.enqueue = _enqueue_a_few
    sys.exit(main())
