"""How networks become operators: what a target runs fastest and a precision allows, in one object.

The graphs say the same whatever is chosen here, but for rounding. A CPU gains from fewer multiplications
(Winograd) and from tensors that stay in its cache (strips); the compilers of a GPU want the plain operators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Target = Literal["cpu", "gpu"]
Residuals = Literal["reckoned", "plans", "kernels"]

INT8_ERROR = 1e-2
"""What int8 may cost a graph unless told otherwise."""

SHALLOW_BLOCKS = 1
"""Output blocks of a shallow graph unless told otherwise: with one such a step takes the least time."""


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """The choices. Byte limits are for one image; None cuts nothing."""

    precision: Precision = "fp32"  # of features and weights; what half cannot hold is float32 in any case
    store: Precision = "fp32"  # of large weights inside the file; cast on opening where that is less
    winograd: bool  # where its cost model says so
    strip_tiles: int  # Winograd tiles of a strip: few enough for a cache, enough for a matrix product
    strip_bytes: int | None  # largest inner tensor of a strip of rows or channel blocks
    score_bytes: int | None  # largest score matrix of an attention or of the quantiser
    sum_kernels: bool  # sum the kernels of an upsampling in the graph: fewer bytes, folded on opening
    centre_norms: bool  # take out what the backend's normalisation leaves of a mean
    kernels: bool = False  # leave what our kernels do faster to them: the graph is then cut there
    residuals: Residuals = "reckoned"  # what inverted residuals are where `kernels`: see kernel_calls
    int8_error: float = INT8_ERROR  # relative L2, of the result, that all int8 layers may make as estimated

    @property
    def values(self) -> Precision:
        """The type of the file's values: half where weights are stored as they are computed with."""
        return self.precision if self.precision == self.store in ("fp16", "bf16") else "fp32"


CPU = Lowering(
    winograd=True,
    strip_tiles=512,
    strip_bytes=16 << 20,
    score_bytes=32 << 20,
    sum_kernels=True,
    centre_norms=True,
)
GPU = Lowering(
    winograd=False,
    strip_tiles=0,
    strip_bytes=None,
    score_bytes=None,
    sum_kernels=False,
    centre_norms=False,
)
TARGETS: dict[Target, Lowering] = {"cpu": CPU, "gpu": GPU}


def lowering(target: Target, precision: Precision = "fp32", store: Precision = "fp32") -> Lowering:
    """The choices for a target in a precision; less than float32 is stored as such, whatever `store` says.

    It has no bits to spare for Winograd's transforms or for kernels summed after rounding, and its own
    rounding hides what a normalisation leaves of a mean. int8 is a matter of single layers: see `quantise`.
    On a CPU bf16 is one of the backend that runs a float32 graph: the file says so to those that can, and
    stores its weights in fp16, which takes no more room and keeps three bits more for those that cannot. A
    GPU's plans are typed as their file is, which then is bfloat16 throughout.
    """
    if precision == "fp32":
        return replace(TARGETS[target], store=store)
    plain = replace(TARGETS[target], winograd=False, sum_kernels=False, centre_norms=False)
    held: Precision = "fp16" if (target, precision) == ("cpu", "bf16") else precision
    return replace(plain, precision=precision, store=held)


def cut(total: int, unit_bytes: int, limit: int | None) -> int:
    """How many of `total` units of `unit_bytes` make a strip: all, or as many as stay under `limit` bytes.

    Strips are even, and hold one unit at least.
    """
    if limit is None:
        return total
    strips = max(1, -(-total * unit_bytes // limit))
    return max(1, -(-total // strips))
