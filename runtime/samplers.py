"""One sampler step over flat arrays, in place.

DDIM (Song et al., ICLR 2021, Eq. 12) predicts the clean latent and moves towards it::

    z_{t-1} = sqrt(a_prev) * x0 + d * eps + sigma * noise,    d = sqrt(1 - a_prev - sigma^2)

with `a = alpha_bar`. A network predicts one of eps, x0 and v = sqrt(a) * eps - sqrt(1 - a) * x0 (Salimans and
Ho, ICLR 2022), and z_t = sqrt(a) * x0 + sqrt(1 - a) * eps gives the others. All of that is linear in `z_t`
and the network's output, so a step is three scalars, computed in float64::

    z_{t-1} = c_z * z_t + c_out * out + c_noise * noise

=====  ================================  ==========================================
       c_z                               c_out
=====  ================================  ==========================================
eps    sqrt(a_prev / a)                  d - sqrt(a_prev * (1 - a) / a)
x0     d / sqrt(1 - a)                   sqrt(a_prev) - d * sqrt(a / (1 - a))
v      sqrt(a * a_prev) + d * sqrt(1-a)  d * sqrt(a) - sqrt(a_prev * (1 - a))
=====  ================================  ==========================================

and the loop makes three multiplications and two additions an element, without a temporary array.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesr.runtime.schedule import StepTable

ETA = {"ddpm": 1.0, "ddim": 0.0}
"""Share of the posterior's noise that each sampler adds, by name."""

Prediction = Literal["eps", "x0", "v"]
"""What a network predicts."""


@dataclass(frozen=True)
class Coefficients:
    """Scalars of one step, float32 (see the module's formulas)."""

    c_z: np.float32
    c_out: np.float32
    c_noise: np.float32


def coefficients(table: StepTable, step: int, prediction: Prediction = "eps") -> Coefficients:
    """Scalars of the step at position `step` of the table (0 is executed first)."""
    a, a_prev, sigma = table.alpha_bar[step], table.alpha_bar_prev[step], table.sigma[step]
    d = np.sqrt(max(1.0 - a_prev - sigma**2, 0.0))
    if prediction == "eps":
        c_z, c_out = np.sqrt(a_prev / a), d - np.sqrt(a_prev * (1.0 - a) / a)
    elif prediction == "x0":
        c_z, c_out = d / np.sqrt(1.0 - a), np.sqrt(a_prev) - d * np.sqrt(a / (1.0 - a))
    else:
        c_z = np.sqrt(a * a_prev) + d * np.sqrt(1.0 - a)
        c_out = d * np.sqrt(a) - np.sqrt(a_prev * (1.0 - a))
    return Coefficients(np.float32(c_z), np.float32(c_out), np.float32(sigma))


def advance(
    z: np.ndarray, out: np.ndarray, noise: np.ndarray | None, c: Coefficients, scratch: np.ndarray
) -> None:
    """Replace `z` (z_t) by z_{t-1}, in place.

    All arrays are float32 of one shape; `out`, the prediction, and `noise` are only read, `scratch` is
    overwritten. `noise` may be None where the step adds none; ValueError where it is missing but needed.
    """
    np.multiply(z, c.c_z, out=z)
    np.multiply(out, c.c_out, out=scratch)
    np.add(z, scratch, out=z)
    if c.c_noise == 0:
        return
    if noise is None:
        raise ValueError(
            f"this step adds noise (sigma {c.c_noise:.6g}) but got none; pass standard normal noise"
        )
    np.multiply(noise, c.c_noise, out=scratch)
    np.add(z, scratch, out=z)
