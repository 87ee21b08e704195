"""Training stages that benchmarks run, with the options of `moesr-train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moesr.training.cli import main as train


def train_stage(
    stage: str, preset: str, directory: Path, changes: Sequence[str], threads: int, *options: object
) -> Path:
    """Train one stage of a preset in `directory`, or continue it there; returns its checkpoint.

    `changes` are those of `--set`, `options` the stage's further options. Exits with the command's code if
    training fails.
    """
    settings = [word for change in changes for word in ("--set", change)]
    told = ["-o", str(directory), "--threads", str(threads), *settings, *map(str, options)]
    code = train([stage, "--config", preset, *told])
    if code:
        raise SystemExit(code)
    return directory / "checkpoint"
