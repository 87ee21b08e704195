"""The use of one of our kernels at one place in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moesr.kernels.registry import OPS

KERNEL_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class KernelCall:
    """One use of an operator of `moesr.kernels.registry`.

    `inputs`, `output` and `weights` go by the buffer names of the operator's plan.
    """

    op: str
    dtype: str
    shape: Mapping[str, int]  # the plan's shape without the batch
    inputs: Mapping[str, str]  # buffer -> value of the graph
    output: tuple[str, str]  # buffer, value of the graph
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # as the reference takes them
    scalars: Mapping[str, int | float | str] = field(default_factory=dict)  # "B" is the number of tiles
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the reference

    def packed(self) -> dict[str, Tensor]:
        """Return the weights by buffer, in the form that the kernels read."""
        if not self.weights:
            return {}
        size = tuple(self.shape[name] for name in ("channels", "height", "width"))
        like = torch.zeros((), dtype=KERNEL_TYPES[self.dtype]).expand(1, *size)
        made = OPS[self.op].prepare({**dict.fromkeys(self.inputs, like), **self.weights})
        return {name: made[name].contiguous() for name in self.weights}

    def reference(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the operator in float32 by its reference."""
        given = {name: value.float() for name, value in {**inputs, **self.weights}.items()}
        return OPS[self.op].reference(**given, **self.options)[self.output[0]]
