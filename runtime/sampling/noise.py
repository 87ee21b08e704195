"""Standard normal noise as a function of (seed, step, position).

The generator is counter-based (Philox-4x64: Salmon et al., SC 2011) and keyed by seed and step over the whole
latent canvas. So results do not depend on tiling, batch, backend or order of execution.

The raw words of NumPy's Philox are the same in all versions, but those of `Generator.standard_normal` may
change, so the transformation from uniform to normal (Box-Muller) is done here, in float64. Platforms may
differ in the last bit of a float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

INITIAL_NOISE = -1
"""The `step` of x_T, the noise from which sampling starts."""

ENCODING_NOISE = (1 << 64) - 2
"""The `step` of the noise with which an encoder's latent is sampled."""

BLOCK = 1 << 17
"""Values that are made at once, an even number; it keeps the float64 temporaries to a few MB."""


def gaussian(seed: int, step: int, shape: tuple[int, ...], out: np.ndarray | None = None) -> np.ndarray:
    """Return the noise of one step for the whole latent canvas: float32 [C, H, W], in `out` if it is given.

    `seed` is 0 .. 2**64 - 1; `step` is `INITIAL_NOISE` or a position in the sampler's list. `out` must be a
    C-contiguous float32 array of that shape. Raises ValueError otherwise.
    """
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != tuple(shape) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(
            f"out must be a C-contiguous float32 array of shape {tuple(shape)}, got {out.dtype} {out.shape}"
        )
    flat = out.reshape(-1)
    for start, values in blocks(seed, step, flat.size):
        flat[start : start + values.size] = values
    return out


def blocks(seed: int, step: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """The first `size` values of `gaussian` in order, in blocks: the first position, and float32 values.

    The array is used again for the next block. ValueError as for `gaussian`.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in 0..2**64 - 1, got {seed}")
    if not INITIAL_NOISE <= step < (1 << 64) - 1:
        raise ValueError(f"step must be {INITIAL_NOISE} (initial noise) or a position from 0 on, got {step}")
    words = np.random.Philox(key=np.array([seed, step - INITIAL_NOISE], np.uint64))
    values = np.empty(min(BLOCK, size), np.float32)
    for start in range(0, size, BLOCK):
        block = values[: size - start]
        _fill(block, words.random_raw((block.size + 1) // 2))
        yield start, block


def _fill(block: np.ndarray, words: np.ndarray) -> None:
    """Box-Muller: word k gives elements 2k and 2k + 1 from its high (radius) and low (angle) 32 bits."""
    radius = (words >> np.uint64(32)).astype(np.float64)
    radius += 0.5  # the uniform is in (0, 1), so log(0) cannot occur and the radius is at most 6.8
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64)
    angle *= 2.0 * math.pi * 2.0**-32
    block[0::2] = radius * np.cos(angle)
    block[1::2] = (radius * np.sin(angle))[: block.size // 2]
