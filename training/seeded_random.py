"""Random numbers that depend on the recipe's seed and a sample's number, and on nothing else.

A sample's draws are its own, so they are the same whatever the batch, the process or the device it falls to,
and a resumed run draws what the uninterrupted one would have. What a network draws for a whole batch (the
token groups of Space MoE) comes from torch's global generators, seeded alike in every process at each step.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

STEP, DEGRADATION, DIFFUSION, SAMPLING, ENCODED = range(5)
"""Streams of a seed that never share numbers."""


def seed_of(*key: int) -> int:
    """A 32-bit seed from non-negative numbers; torch's generator on the CPU uses no more bits."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class Draws:
    """Random numbers on the CPU for the samples of a batch, one generator a sample."""

    def __init__(self, seed: int, stream: int, indices: Iterable[int]) -> None:
        self.generators = [
            torch.Generator().manual_seed(seed_of(seed, stream, int(index))) for index in indices
        ]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32 [B, *shape]."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def integers(self, low: int, high: int) -> Tensor:
        """One integer of [low, high) a sample, int64 [B]."""
        return torch.cat([torch.randint(low, high, (1,), generator=g) for g in self.generators])
