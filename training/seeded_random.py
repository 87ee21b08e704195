"""Random numbers that depend on the recipe's seed and a sample's number, and on nothing else.

Every sample has its own generator, so its random numbers do not depend on its batch, process or device, and a
resumed run draws the same numbers as an uninterrupted one. Random numbers that a network draws for a whole
batch (the token groups of Space MoE) come from torch's global generators, which get the same seed in every
process at each step.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

STEP, DEGRADATION, DIFFUSION, SAMPLING, ENCODED = range(5)
"""Independent streams of random numbers for one seed, by purpose."""


def seed_of(*key: int) -> int:
    """Hash non-negative integers to a 32-bit seed; torch's CPU generator does not use more bits."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class SampleRng:
    """Seeded random numbers on the CPU for the samples of a batch, from one generator per sample."""

    def __init__(self, seed: int, stream: int, indices: Iterable[int]) -> None:
        self.generators = [
            torch.Generator().manual_seed(seed_of(seed, stream, int(index))) for index in indices
        ]

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers, float32 [B, *shape]."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def integers(self, low: int, high: int) -> Tensor:
        """Draw one integer of [low, high) per sample, int64 [B]."""
        return torch.cat([torch.randint(low, high, (1,), generator=g) for g in self.generators])
