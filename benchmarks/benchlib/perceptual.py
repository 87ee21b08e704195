"""Learned measures through pyiqa, where it and its weights are at hand; else a table has fewer columns."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

COLUMNS = {"lpips": "LPIPS↓", "musiq": "MUSIQ↑", "niqe": "NIQE↓", "clipiqa": "CLIP-IQA↑"}
"""Names in pyiqa and headings of the measures of one image."""

FID = "fid"  # of two sets of images: no score of one image
HEADINGS = {**COLUMNS, FID: "FID↓"}


def load() -> dict[str, Any]:
    """Every measure that can be had, by name; one line on stderr for what cannot, and how to get it."""
    try:
        pyiqa = importlib.import_module("pyiqa")
    except ImportError:
        _say(f"no {', '.join(HEADINGS)}: pyiqa is not installed; pip install pyiqa")
        return {}
    found: dict[str, Any] = {}
    for name in HEADINGS:
        try:
            found[name] = pyiqa.create_metric(name, device=torch.device("cpu"))
        except Exception as error:  # a download or a dependency of pyiqa's, raising what it likes
            problem = " ".join(str(error).split()) or type(error).__name__
            _say(
                f"no {name}: {problem}; its weights come over the network on first use: "
                f"run pyiqa.create_metric({name!r}) once on a machine that is online and copy its cache"
            )
    return found


def scores(found: Mapping[str, Any], sr: np.ndarray, hr: np.ndarray | None) -> dict[str, float]:
    """Measures of one uint8 image [H, W, 3] against its original; NaN where a measure fails on it.

    Without an original only those that need none.
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
    """Frechet inception distance of two directories of images; it means little below some thousand images."""
    return _guarded(FID, lambda: float(found[FID](str(sr_dir), str(hr_dir))))


def _guarded(name: str, measure: Callable[[], float]) -> float:
    try:
        return measure()
    except Exception as error:  # a network made for larger images, or a set too small: the table goes on
        _say(f"{name} failed here: {' '.join(str(error).split())}")
        return float("nan")


def _say(message: str) -> None:
    print(message, file=sys.stderr)
