"""Standard normal noise as a function of (seed, step, position).

The generator is counter-based (Philox-4x64: Salmon et al., SC 2011) and keyed by seed and step over the whole
latent canvas. So results do not depend on tiling, batch, backend or order of execution.

The raw words of NumPy's Philox are the same in all versions, but those of `Generator.standard_normal` may
change, so the transformation from uniform to normal (Box-Muller) is done here, in float64. Platforms may
differ in the last bit of a float32.
"""

from __future__ import annotations

import math

import numpy as np

INITIAL_NOISE = -1
"""The `step` of x_T, the noise from which sampling starts."""

ENCODING_NOISE = (1 << 64) - 2
"""The `step` of the noise with which an encoder's latent is sampled."""

_BLOCK_WORDS = 1 << 16  # keeps the float64 temporaries to a few MB


def gaussian(seed: int, step: int, shape: tuple[int, ...], out: np.ndarray | None = None) -> np.ndarray:
    """Return the noise of one step for the whole latent canvas: float32 [C, H, W], in `out` if it is given.

    `seed` is 0 .. 2**64 - 1; `step` is `INITIAL_NOISE` or a position in the sampler's list. `out` must be a
    C-contiguous float32 array of that shape. Raises ValueError otherwise.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in 0..2**64 - 1, got {seed}")
    if not INITIAL_NOISE <= step < (1 << 64) - 1:
        raise ValueError(f"step must be {INITIAL_NOISE} (initial noise) or a position from 0 on, got {step}")
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != tuple(shape) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(
            f"out must be a C-contiguous float32 array of shape {tuple(shape)}, got {out.dtype} {out.shape}"
        )
    words = np.random.Philox(key=np.array([seed, step - INITIAL_NOISE], np.uint64))
    flat = out.reshape(-1)
    for start in range(0, flat.size, 2 * _BLOCK_WORDS):
        block = flat[start : start + 2 * _BLOCK_WORDS]
        _fill(block, words.random_raw((block.size + 1) // 2))
    return out


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
