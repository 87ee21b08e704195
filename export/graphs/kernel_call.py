"""One use of one of our kernels in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesr.kernels.registry import OPS

if TYPE_CHECKING:
    pass

KERNEL_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
        size = tuple(self.shape[name] for name in ("channels", "height", "width"))
        like = torch.zeros((), dtype=KERNEL_TYPES[self.dtype]).expand(1, *size)
        made = OPS[self.op].prepare({**dict.fromkeys(self.inputs, like), **self.weights})
        return {name: made[name].contiguous() for name in self.weights}

    def reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the operator makes of its inputs, in float32."""
        given = {name: value.float() for name, value in {**inputs, **self.weights}.items()}
        return OPS[self.op].reference(**given, **self.options)[self.output[0]]
