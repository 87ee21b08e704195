"""Operators of the decoder that are left to our kernels: nodes by which its graph is cut into parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesr.kernels.registry import OPS
from moesr.training.networks.refinement import AFFFilter

if TYPE_CHECKING:
    from moesr.export.graph import GraphBuilder, Value

ARCHITECTURE = 90  # whether a plan exists does not depend on it
KERNEL_TYPES = {torch.float32: "fp32", torch.float16: "fp16"}


@dataclass(frozen=True, eq=False)
class KernelCall:
    """One use of an operator of `moesr.kernels.registry`, by names of its plan's buffers.

    `weights` are as the reference takes them; scalars are numbers, or "B" for the number of tiles.
    """

    op: str
    dtype: str
    shape: Mapping[str, int]  # all of the plan's but the batch
    inputs: Mapping[str, str]  # buffer to value
    output: tuple[str, str]  # buffer and value
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, int | float | str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # what else the reference takes

    def packed(self) -> dict[str, Tensor]:
        """The weights as the kernels read them, by buffer."""
        if not self.weights:
            return {}
        dtype = next(t for t, name in KERNEL_TYPES.items() if name == self.dtype)
        size = tuple(self.shape[name] for name in ("channels", "height", "width"))
        like = torch.zeros((), dtype=dtype).expand(1, *size)
        made = OPS[self.op].prepare({**dict.fromkeys(self.inputs, like), **self.weights})
        return {name: made[name].contiguous() for name in self.weights}

    def reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the operator makes of its inputs, in float32."""
        given = {name: value.float() for name, value in {**inputs, **self.weights}.items()}
        return OPS[self.op].reference(**given, **self.options)[self.output[0]]


def possible(op: str, shape: Mapping[str, int], dtype: str) -> bool:
    """Whether the kernels of an operator take a shape."""
    try:
        OPS[op].plan({"batch": 1, "heads": 1, **shape}, dtype, ARCHITECTURE)
    except ValueError:
        return False
    return True


def aff_filter(g: GraphBuilder, x: Value, module: AFFFilter) -> Value | None:
    """The adaptive frequency filter of [B, C, H, W]; None where it must be computed otherwise."""
    weights = {name: getattr(module, name).detach() for name in ("w1", "b1", "w2", "b2")}
    channels, height, width = (x.size(axis) for axis in (1, 2, 3))
    blocks = weights["w1"].shape[1]
    shape = {"channels": channels, "blocks": blocks, "height": height, "width": width, "norm": 0}
    if not (g.lowering.kernels and possible("aff_filter", shape, g.lowering.precision)):
        return None
    return g.kernel("aff_filter", shape, {"x": x}, "y", like=x, weights=weights, scalars={"batch": "B"})


def attention(g: GraphBuilder, q: Value, k: Value, v: Value) -> Value | None:
    """Attention over [B, channels, tokens] with `q` already scaled; None where the graph must have it."""
    shape = {"tokens": q.size(2), "width": q.size(1), "tokens_last": 1, "packed": 0}
    if not (g.lowering.kernels and possible("attention", shape, g.lowering.precision)):
        return None
    return g.kernel(
        "attention",
        shape,
        {"q": q, "k": k, "v": v},
        "out",
        like=v,
        scalars={"heads": "B", "tokens": q.size(2), "scale": 1.0},
        options={"scale": 1.0, "tokens_last": True},
    )
