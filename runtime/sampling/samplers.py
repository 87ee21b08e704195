"""One sampler step over flat arrays, in place.

DDIM (Song et al., ICLR 2021, Eq. 12) predicts the clean latent and moves towards it::

    z_{t-1} = sqrt(a_prev) * x0 + d * eps + sigma * noise,    d = sqrt(1 - a_prev - sigma^2)

with `a = alpha_bar`. A network predicts one of eps, x0 and v = sqrt(a) * eps - sqrt(1 - a) * x0 (Salimans and
Ho, ICLR 2022), and the others follow from z_t = sqrt(a) * x0 + sqrt(1 - a) * eps. All of this is linear in
`z_t` and the network's output, so a step needs three scalars, computed in float64::

    z_{t-1} = c_z * z_t + c_out * out + c_noise * noise

=====  ================================  ==========================================
       c_z                               c_out
=====  ================================  ==========================================
eps    sqrt(a_prev / a)                  d - sqrt(a_prev * (1 - a) / a)
x0     d / sqrt(1 - a)                   sqrt(a_prev) - d * sqrt(a / (1 - a))
v      sqrt(a * a_prev) + d * sqrt(1-a)  d * sqrt(a) - sqrt(a_prev * (1 - a))
=====  ================================  ==========================================

and the loop makes three multiplications and two additions per element, without a temporary array.

DPM-Solver++ (Lu et al., 2022, Algorithm 2: data prediction, multistep, second order) takes the step of DDIM
(d = sqrt(1 - a_prev)) with an x0 that is extrapolated linearly from the x0 of the previous step::

    x0' = (1 + w) * x0 - w * x0_before,    w = h / (2 h_before)

where h is the increase of lambda = log(a / (1 - a)) / 2 in a step. With
k = sqrt(a_prev) - d * sqrt(a / (1 - a)) and x0 = x_z * z_t + x_out * out, this is linear again::

    z_{t-1} = (d / sqrt(1 - a) + k (1 + w) x_z) * z_t + k (1 + w) x_out * out - k w * x0_before

=====  ===========  ====================
       x_z          x_out
=====  ===========  ====================
eps    1 / sqrt(a)  -sqrt((1 - a) / a)
x0     0            1
v      sqrt(a)      -sqrt(1 - a)
=====  ===========  ====================

In the first step w is 0, because there is no previous x0, and in the last step, which may be infinitely long
in lambda, w is 0, too. The stored x0 is an estimate of the clean latent by any expert, so it is kept when the
next expert takes over; `docs/architecture.md` has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesr.runtime.sampling.schedule import Schedule, StepTable, step_table


@dataclass(frozen=True)
class Sampler:
    """A sampler, which is a row of SAMPLERS.

    `eta` is the fraction of the posterior's noise that a step adds: 1 is DDPM, 0 is deterministic. A
    `multistep` sampler uses the x0 of the previous step, so `advance` needs a history.
    """

    eta: float
    multistep: bool = False

    def table(self, schedule: Schedule, steps: int, ranges: Sequence[tuple[int, int]]) -> StepTable:
        """Return the steps of one run; `ranges` and ValueError are those of `step_table`."""
        return step_table(schedule, steps, self.eta, ranges, multistep=self.multistep)


SAMPLERS = {
    "ddpm": Sampler(eta=1.0),
    "ddim": Sampler(eta=0.0),
    "dpm++2m": Sampler(eta=0.0, multistep=True),
}
"""Every sampler by its name in options, engines and checkpoints."""

Prediction = Literal["eps", "x0", "v"]
"""The quantity that a network predicts."""

_ZERO = np.float32(0.0)


@dataclass(frozen=True)
class Coefficients:
    """Scalars of one step, float32, as in the formulas above; only multistep samplers use the last three.

    `c_history` weights the x0 of the previous step; the x0 of this step is `x_z * z_t + x_out * out`.
    """

    c_z: np.float32
    c_out: np.float32
    c_noise: np.float32
    c_history: np.float32 = _ZERO
    x_z: np.float32 = _ZERO
    x_out: np.float32 = _ZERO


def coefficients(table: StepTable, step: int, prediction: Prediction = "eps") -> Coefficients:
    """Return the scalars of the step at position `step` of the table (0 is executed first)."""
    a, a_prev, sigma = table.alpha_bar[step], table.alpha_bar_prev[step], table.sigma[step]
    d = np.sqrt(max(1.0 - a_prev - sigma**2, 0.0))
    if prediction == "eps":
        c_z, c_out = np.sqrt(a_prev / a), d - np.sqrt(a_prev * (1.0 - a) / a)
    elif prediction == "x0":
        c_z, c_out = d / np.sqrt(1.0 - a), np.sqrt(a_prev) - d * np.sqrt(a / (1.0 - a))
    else:
        c_z = np.sqrt(a * a_prev) + d * np.sqrt(1.0 - a)
        c_out = d * np.sqrt(a) - np.sqrt(a_prev * (1.0 - a))
    x_z, x_out = _clean(a, prediction)
    k = (np.sqrt(a_prev) - d * np.sqrt(a / (1.0 - a))) * table.extrapolation[step]
    return Coefficients(*map(np.float32, (c_z + k * x_z, c_out + k * x_out, sigma, -k, x_z, x_out)))


def _clean(a: float, prediction: Prediction) -> tuple[float, float]:
    """Return the weights (x_z, x_out) of z_t and of the network's output in x0, at an alpha_bar of `a`."""
    if prediction == "eps":
        return 1.0 / math.sqrt(a), -math.sqrt((1.0 - a) / a)
    return (0.0, 1.0) if prediction == "x0" else (math.sqrt(a), -math.sqrt(1.0 - a))


def advance(
    z: np.ndarray,
    out: np.ndarray,
    noise: np.ndarray | None,
    c: Coefficients,
    scratch: np.ndarray,
    history: np.ndarray | None = None,
) -> None:
    """Replace `z` (z_t) by z_{t-1} in place, and `history`, the x0 of the previous step, by the new x0.

    All arrays are float32 of one shape. `out`, the prediction, and `noise` are only read; `scratch` is
    overwritten. `noise` may be None if the step adds none, and `history` if the sampler is not multistep.
    Raises ValueError if one is missing but needed.
    """
    if history is not None:
        np.multiply(history, c.c_history, out=scratch)
        np.multiply(z, c.x_z, out=history)
    elif c.c_history != 0:
        raise ValueError("this step needs the x0 of the previous step but got none; pass the history")
    np.multiply(z, c.c_z, out=z)
    if history is not None:
        np.add(z, scratch, out=z)
        np.multiply(out, c.x_out, out=scratch)
        np.add(history, scratch, out=history)
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
