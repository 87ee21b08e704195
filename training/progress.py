"""The progress bar of training, with the time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar on stderr; where that is a file, a line every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(*args, file=sys.stderr, mininterval=interval, dynamic_ncols=True, **options)
