"""The options of an export in one dataclass, and the lowering of each arrangement that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from moesr.export.lowering import INT8_ERROR, Lowering, Precision, Residuals, Target, lowering
from moesr.export.prompts import PromptOptions
from moesr.runtime.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The choices of a user.

    `target` "both" writes every graph twice: for a CPU in float32, and for a GPU in `precision`. `store`
    "fp16" halves the file of a float32 graph. `kernels` adds, for a GPU, a decoder that is cut at the
    operators which our kernels compute; `residuals` says what computes its inverted residuals (see
    `Lowering`). `tile_px` is the side of a tile in output pixels; None is the model's usual one. `int8_error`
    is the relative L2 error that int8 may cause in the result of a graph. `reuse` adds shallow graphs of
    that many output blocks. `polygraphy` also writes the inputs of every graph (see `polygraphy_data`).
    `preview` runs the finished engine once, to fit the map of its previews.
    """

    target: Target | Literal["both"] = "cpu"
    precision: Precision = "fp32"
    store: Precision = "fp32"
    tile_px: int | None = None
    prompts: PromptOptions = field(default_factory=PromptOptions)
    kernels: bool = False
    residuals: Residuals = "plans"
    int8_error: float = INT8_ERROR
    reuse: int | None = None
    polygraphy: bool = False
    preview: bool = False

    def lowerings(self) -> dict[str, Lowering]:
        """Return the lowering of each arrangement; the first is the engine's own, the others are variants.

        UsageError is raised if the target does not support the precision.
        """
        if self.precision == "int8" and self.target != "cpu":
            raise UsageError("--int8 is for CPUs; export it with --target cpu, and use --fp16 for a GPU")
        found: dict[str, Lowering] = {}
        if self.target != "gpu":
            precision = "fp32" if self.target == "both" else self.precision
            found["cpu"] = lowering("cpu", precision, self.store)
        if self.target != "cpu":
            found["gpu"] = lowering("gpu", self.precision, self.store)
            if self.kernels:
                found["parts"] = replace(found["gpu"], kernels=True, residuals=self.residuals)
        return {name: replace(each, int8_error=self.int8_error) for name, each in found.items()}
