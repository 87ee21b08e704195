"""What the latency benchmark compares: a table of rungs, and of the engines that they need.

A rung that this version cannot climb (a precision or option that `moesr-export` lacks, a library that is not
installed) is listed with the reason and left out.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesr.export.lowering import SHALLOW_BLOCKS
from moesr.export.options import ExportOptions
from moesr.export.package import export_engine
from moesr.runtime.backends.selection import candidates
from moesr.runtime.errors import MoesrError
from moesr.training.checkpoint import Checkpoint

EXPERTS = 4  # of the published models: features are not reused across their borders

PHOTOGRAPHS = 2  # that int8 is calibrated and proved on: the weights are random

ANY_ERROR = 1.0
"""Of int8: all layers that can be are, since random weights do not tell which of a trained model may not."""


@dataclass(frozen=True)
class Rung:
    """One way to make an image; `arithmetic` names the limit that it is held against."""

    name: str
    way: str  # "eager", "autocast", "compiled": PyTorch's; "plain": ONNX Runtime's defaults; "engine": ours
    engine: str = ""  # of ENGINES; PyTorch runs the checkpoint
    backend: str = "onnxruntime"
    precision: str = "graph"
    arithmetic: str = "fp32"
    reuse: int = 1  # one step in so many computes the deep levels
    sampler: str = "ddpm"
    steps: int = 20  # of the ladder's image
    target: float | None = None  # times faster than eager PyTorch's image of 20 steps

    @property
    def full_steps(self) -> int:
        """How many of `steps` compute every level, where experts share them evenly."""
        return self.full(self.steps)

    def full(self, steps: int) -> int:
        """The same for another number of steps."""
        ends = [steps * k // EXPERTS for k in range(EXPERTS + 1)]
        return sum(-(-(b - a) // self.reuse) for a, b in itertools.pairwise(ends))


ENGINES = {
    "float32": ExportOptions(),
    "plain": ExportOptions(target="gpu"),
    "int8": ExportOptions(precision="int8", int8_error=ANY_ERROR),
    "reuse": ExportOptions(reuse=SHALLOW_BLOCKS),
    "int8-reuse": ExportOptions(precision="int8", int8_error=ANY_ERROR, reuse=SHALLOW_BLOCKS),
}
"""Options of the exported engines, by name."""


def _int8_and_bf16(more: str, **options: Any) -> Rung:
    """What is not int8 in bf16, as OpenVINO does it."""
    base = Rung(f"moesr int8 and bf16, OpenVINO{more}", "engine", "int8", "openvino", "bf16", "int8")
    return replace(base, **options)


RUNGS = (
    Rung("PyTorch, eager", "eager"),
    Rung("PyTorch, torch.compile", "compiled"),
    Rung("PyTorch, bf16 autocast, channels last", "autocast", arithmetic="bf16"),
    Rung("ONNX Runtime, plain graph", "plain", "plain"),
    Rung("moesr float32", "engine", "float32", target=2.2),
    Rung("moesr float32, OpenVINO", "engine", "plain", "openvino"),
    Rung("moesr float32, reuse 3", "engine", "reuse", reuse=3),
    Rung("moesr bf16, OpenVINO", "engine", "plain", "openvino", "bf16", "bf16", target=4.0),
    Rung("moesr int8", "engine", "int8", arithmetic="int8", target=6.0),
    Rung("moesr int8, reuse 3", "engine", "int8-reuse", arithmetic="int8", reuse=3, target=9.0),
    _int8_and_bf16("", target=6.0),
    _int8_and_bf16(", reuse 3", engine="int8-reuse", reuse=3, target=9.0),
    _int8_and_bf16(
        ", reuse 3, DPM-Solver++ of 10 steps", engine="int8-reuse", reuse=3, sampler="dpm++2m", steps=10
    ),
)
"""The optimisation ladder, from the bottom."""

EAGER = RUNGS[0]


def obstacle(rung: Rung) -> str | None:
    """Why a rung cannot be climbed here; None where it can."""
    if rung.sampler != "ddpm":
        from moesr.runtime.sampling.samplers import SAMPLERS

        if rung.sampler not in SAMPLERS:
            return f"there is no sampler {rung.sampler}"
    if rung.way == "compiled" and importlib.util.find_spec("torch._inductor") is None:
        return "this PyTorch cannot compile"
    if rung.way == "engine":
        try:
            candidates(rung.backend, "cpu", precision=rung.precision)
        except MoesrError as error:
            return str(error)
    return None


def export(name: str, checkpoint: Checkpoint, directory: Path, tile_px: int) -> str | None:
    """Export one of ENGINES, which proves it; returns why that could not be, None where it was done."""
    options = replace(ENGINES[name], tile_px=tile_px)
    photographs = _photographs() if options.precision == "int8" else ()
    try:
        export_engine(checkpoint, directory, options, photographs=photographs)
    except MoesrError as error:
        return str(error)
    return None


def _photographs() -> Sequence[Any]:
    from moesr.export.quantisation import calibration  # type: ignore[attr-defined]

    return calibration.demo_photographs(PHOTOGRAPHS)
