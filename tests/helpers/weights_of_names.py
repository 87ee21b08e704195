"""Weights that are computed from the names of the tensors, so that goldens need not store them.

The rule is that of the reference data, where a salt selects a set of weights. The generator of a tensor is
seeded with the CRC-32 of "SALT:NAME".
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def weight(name: str, shape: Sequence[int], salt: str) -> np.ndarray:
    """Return the tensor called `name`: float32, or int64 zeros for a counter."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{salt}:{name}".encode())))
    normal = generator.standard_normal(tuple(shape)).astype(np.float32)
    if leaf == "running_var":
        return 1 + 0.2 * np.abs(normal)
    if name.endswith("embedding.weight"):
        return normal
    if leaf in ("w1", "w2"):  # weights of the AFF filter: [2, blocks, in, out]
        return normal * np.float32(0.5 / np.sqrt(shape[2]))
    if leaf in ("b1", "b2"):
        return 0.05 * normal
    if len(shape) > 1:  # a convolution or a linear layer
        return normal / np.float32(np.sqrt(np.prod(shape[1:])))
    return 1 + 0.1 * normal if leaf == "weight" else 0.1 * normal


def weights(shapes: Mapping[str, Sequence[int]], salt: str) -> dict[str, np.ndarray]:
    """Return all tensors of a network; the shapes are given by name."""
    return {name: weight(name, shape, salt) for name, shape in shapes.items()}
