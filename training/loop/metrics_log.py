"""The log of a run's figures: one line of JSON per step and, if requested, TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from moesr.runtime.errors import UsageError
from moesr.runtime.system.files import new_file
from moesr.training.loop import distributed

LOG_NAME = "losses.jsonl"
EVENTS_NAME = "tensorboard"


class MetricsLog:
    """Writes figures by step to `losses.jsonl`, in process 0 only; a resumed run replaces repeated steps."""

    def __init__(self, directory: Path, first_step: int, *, tensorboard: bool = False) -> None:
        self._file, self._events = None, None
        if distributed.rank() > 0:
            return
        path = directory / LOG_NAME
        _forget(path, first_step)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        if tensorboard:
            self._events = summary_writer()(log_dir=str(directory / EVENTS_NAME), purge_step=first_step)

    def write(self, step: int, figures: Mapping[str, float], picture: Tensor | None = None) -> None:
        """Add the figures of `step` and, for TensorBoard, a picture uint8 [3, H, W]."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._events is not None:
            for name, value in figures.items():
                self._events.add_scalar(name, value, step)
            if picture is not None:
                self._events.add_image("validation", picture, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._file, self._events):
            if stream is not None:
                stream.close()


def summary_writer() -> Any:
    """Return the class that writes TensorBoard events; UsageError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--tensorboard: TensorBoard is not installed ({error}); pip install 'moesr[train]', or omit it "
            f"(figures are in {LOG_NAME} anyway)"
        ) from error
    return SummaryWriter


def _forget(path: Path, first_step: int) -> None:
    """Remove the lines of `first_step` and later steps, and an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with new_file(path) as scratch:
        scratch.write_text("".join(kept), encoding="utf-8")
