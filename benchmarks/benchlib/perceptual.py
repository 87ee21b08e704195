"""Learned measures from pyiqa, if it and its weights are available; otherwise tables omit these columns."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

COLUMNS = {"lpips": "LPIPS↓", "musiq": "MUSIQ↑", "niqe": "NIQE↓", "clipiqa": "CLIP-IQA↑"}
"""Measures of single images: their names in pyiqa and their headings."""

FID = "fid"  # a measure of two sets of images
HEADINGS = {**COLUMNS, FID: "FID↓"}


def load() -> dict[str, Any]:
    """Load the available measures by name; for each missing one, a line on stderr says how to get it."""
    try:
        pyiqa = importlib.import_module("pyiqa")
    except ImportError:
        _say(f"no {', '.join(HEADINGS)}: pyiqa is not installed; pip install pyiqa")
        return {}
    found: dict[str, Any] = {}
    for name in HEADINGS:
        try:
            found[name] = pyiqa.create_metric(name, device=torch.device("cpu"))
        except Exception as error:  # downloads and dependencies of pyiqa can raise anything
            problem = " ".join(str(error).split()) or type(error).__name__
            _say(
                f"no {name}: {problem}; its weights come over the network on first use: "
                f"run pyiqa.create_metric({name!r}) once on a machine that is online and copy its cache"
            )
    return found


def scores(found: Mapping[str, Any], sr: np.ndarray, hr: np.ndarray | None) -> dict[str, float]:
    """Score one uint8 image [H, W, 3] against its original; NaN if a measure fails.

    Without an original, only the measures that need none are computed.
    """
    if hr is None:
        found = {name: metric for name, metric in found.items() if metric.metric_mode != "FR"}
    if not found:
        return {}
    tensors = [torch.tensor(x).permute(2, 0, 1)[None].float() / 255 for x in (sr, sr if hr is None else hr)]

    def value(metric: Any) -> float:
        with torch.inference_mode():
            return float(metric(*tensors) if metric.metric_mode == "FR" else metric(tensors[0]))

    return {name: _guarded(name, lambda m=found[name]: value(m)) for name in COLUMNS if name in found}


def fid(found: Mapping[str, Any], sr_dir: Path, hr_dir: Path) -> float:
    """Frechet inception distance of two directories of images; not meaningful below some thousand images."""
    return _guarded(FID, lambda: float(found[FID](str(sr_dir), str(hr_dir))))


def _guarded(name: str, measure: Callable[[], float]) -> float:
    try:
        return measure()
    except Exception as error:  # for example, the image is too small for the network
        _say(f"{name} failed here: {' '.join(str(error).split())}")
        return float("nan")


def _say(message: str) -> None:
    print(message, file=sys.stderr)
