"""The configurations that the latency benchmark compares, called rungs, and the engines that they need.

A rung that cannot run on this machine, for example because a library is not installed, is listed with the
reason and left out.
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesr.export.lowering import SHALLOW_BLOCKS
from moesr.export.options import ExportOptions
from moesr.export.package import export_engine
from moesr.export.quantisation import calibration
from moesr.runtime.backends.selection import candidates
from moesr.runtime.errors import MoesrError
from moesr.training.checkpoint import Checkpoint

EXPERTS = 4  # number of experts of the published models; features are not reused from one to the next

PHOTOGRAPHS = 2  # for the calibration and the parity check of int8; few suffice, as the weights are random

ANY_ERROR = 1.0
"""Error budget that makes all supported layers int8, since random weights do not show sensitive layers."""


@dataclass(frozen=True)
class Rung:
    """One configuration: a way to make an image. `arithmetic` names the peak rate to compare it with."""

    name: str
    way: str  # PyTorch: "eager", "autocast", "compiled"; ONNX Runtime's defaults: "plain"; ours: "engine"
    engine: str = ""  # a key of ENGINES; empty for PyTorch, which runs the checkpoint
    backend: str = "onnxruntime"
    precision: str = "graph"
    arithmetic: str = "fp32"
    reuse: int = 1  # every `reuse`-th step computes the deep levels
    sampler: str = "ddpm"
    steps: int = 20  # sampling steps of the image in the ladder
    target: float | None = None  # wanted speed-up over eager PyTorch's image of 20 steps

    def full(self, steps: int) -> int:
        """Return how many of `steps` steps compute all levels, if the experts have equal numbers of steps."""
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
    """Return a rung of OpenVINO whose layers that are not int8 run in bf16."""
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
    """Return why a rung cannot run on this machine; None if it can."""
    if rung.way == "compiled" and importlib.util.find_spec("torch._inductor") is None:
        return "this PyTorch cannot compile"
    if rung.way == "engine":
        try:
            candidates(rung.backend, "cpu", precision=rung.precision)
        except MoesrError as error:
            return str(error)
    return None


def export(name: str, checkpoint: Checkpoint, directory: Path, tile_px: int) -> str | None:
    """Export one of ENGINES, including its parity check; returns the reason of a failure, else None."""
    options = replace(ENGINES[name], tile_px=tile_px)
    photographs = calibration.demo_photographs(PHOTOGRAPHS) if options.precision == "int8" else ()
    try:
        export_engine(checkpoint, directory, options, photographs=photographs)
    except MoesrError as error:
        return str(error)
    return None
