"""The choices by which networks become operators; they depend on the target and the precision.

Apart from rounding, the graphs compute the same whatever is chosen here. A CPU gains from fewer
multiplications (Winograd) and from tensors that stay in its cache (strips); compilers for GPUs want the plain
operators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Target = Literal["cpu", "gpu"]
Residuals = Literal["plans", "kernels", "estimated"]

INT8_ERROR = 1e-2
"""The relative L2 error that int8 may cause in a graph's result by default."""

SHALLOW_BLOCKS = 1
"""The default number of output blocks of a shallow graph; with one block a shallow step is fastest."""


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """The choices. Byte limits are for one image; None means that nothing is cut into strips."""

    precision: Precision = "fp32"  # of features and weights, except where half precision is too narrow
    store: Precision = "fp32"  # of large weights in the file; a narrower type is cast on opening
    winograd: bool  # use Winograd convolutions where its cost model says so
    strip_tiles: int  # Winograd tiles per strip: few enough for the cache, enough for a fast product
    strip_bytes: int | None  # largest inner tensor of a strip of rows or channel blocks
    score_bytes: int | None  # largest matrix of scores of an attention, or of distances of the quantiser
    sum_kernels: bool  # sum the kernels of an upsampling in the graph: a smaller file, folded on opening
    centre_norms: bool  # correct the mean, which the backend's normalisation removes imprecisely
    kernels: bool = False  # cut the graph at the operators that our kernels compute
    residuals: Residuals = "plans"  # with `kernels`: what computes inverted residuals, see `kernel_nodes`
    int8_error: float = INT8_ERROR  # estimated relative L2 error of the result that int8 layers may cause

    @property
    def values(self) -> Precision:
        """The type of the file's values: half precision if weights are stored in it and computed with it."""
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
    """Return the choices for a target in a precision.

    Precisions below float32 are stored as such, whatever `store` says. They have no bits to spare for
    Winograd's transforms or for kernels that are summed after rounding, and their rounding hides the mean
    that a normalisation leaves. int8 is decided layer by layer (see `quantisation`).

    On a CPU the graph is float32, and the backend computes it in bf16. Its weights are stored in fp16,
    which is as small as bf16 and keeps three more bits for backends that compute in float32. A GPU's plans
    take their types from the file, which is then bfloat16 throughout.
    """
    if precision == "fp32":
        return replace(TARGETS[target], store=store)
    plain = replace(TARGETS[target], winograd=False, sum_kernels=False, centre_norms=False)
    held: Precision = "fp16" if (target, precision) == ("cpu", "bf16") else precision
    return replace(plain, precision=precision, store=held)


def cut(total: int, unit_bytes: int, limit: int | None) -> int:
    """Return how many of `total` units of `unit_bytes` form a strip of at most `limit` bytes (None: all).

    The strips are about equal and hold at least one unit.
    """
    if limit is None:
        return total
    strips = max(1, -(-total * unit_bytes // limit))
    return max(1, -(-total // strips))
