"""One sampler step over flat arrays, in place.

DDIM (Song et al., ICLR 2021, Eq. 12) predicts the clean latent and moves towards it::

    x0      = (z_t - sqrt(1 - a) * eps) / sqrt(a)
    z_{t-1} = sqrt(a_prev) * x0 + sqrt(1 - a_prev - sigma^2) * eps + sigma * noise

with `a = alpha_bar`. Both are linear in `z_t` and `eps`, so each is two scalars computed in float64 once a
step::

    x0      = x0_z * z_t + x0_eps * eps
    z_{t-1} = c_z  * z_t + c_eps  * eps + c_noise * noise

    c_z   = sqrt(a_prev / a)
    c_eps = sqrt(1 - a_prev - sigma^2) - sqrt(a_prev * (1 - a) / a)

and the loop makes three multiplications and two additions an element, without a temporary array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesr.runtime.schedule import StepTable

ETA = {"ddpm": 1.0, "ddim": 0.0}
"""Share of the posterior's noise that each sampler adds, by name."""


@dataclass(frozen=True)
class Coefficients:
    """Scalars of one step, float32 (see the module's formulas)."""

    x0_z: np.float32
    x0_eps: np.float32
    c_z: np.float32
    c_eps: np.float32
    c_noise: np.float32


def coefficients(table: StepTable, step: int) -> Coefficients:
    """Scalars of the step at position `step` of the table (0 is executed first)."""
    a, a_prev, sigma = table.alpha_bar[step], table.alpha_bar_prev[step], table.sigma[step]
    direction = np.sqrt(max(1.0 - a_prev - sigma**2, 0.0))
    return Coefficients(
        x0_z=np.float32(1.0 / np.sqrt(a)),
        x0_eps=np.float32(-np.sqrt((1.0 - a) / a)),
        c_z=np.float32(np.sqrt(a_prev / a)),
        c_eps=np.float32(direction - np.sqrt(a_prev * (1.0 - a) / a)),
        c_noise=np.float32(sigma),
    )


def advance(
    z: np.ndarray, eps: np.ndarray, noise: np.ndarray | None, c: Coefficients, scratch: np.ndarray
) -> None:
    """Replace `z` (z_t) by z_{t-1}, in place.

    All arrays are float32 of one shape; `eps` and `noise` are only read, `scratch` is overwritten. `noise`
    may be None where the step adds none; ValueError where it is missing but needed.
    """
    np.multiply(z, c.c_z, out=z)
    np.multiply(eps, c.c_eps, out=scratch)
    np.add(z, scratch, out=z)
    if c.c_noise == 0:
        return
    if noise is None:
        raise ValueError(
            f"this step adds noise (sigma {c.c_noise:.6g}) but got none; pass standard normal noise"
        )
    np.multiply(noise, c.c_noise, out=scratch)
    np.add(z, scratch, out=z)


def predict_x0(z: np.ndarray, eps: np.ndarray, c: Coefficients, out: np.ndarray, scratch: np.ndarray) -> None:
    """Write the clean latent that `eps` implies at z_t to `out`; all float32 of one shape."""
    np.multiply(z, c.x0_z, out=out)
    np.multiply(eps, c.x0_eps, out=scratch)
    np.add(out, scratch, out=out)
