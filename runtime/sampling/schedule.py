"""The noise schedule and the sampler's list of steps, computed once in float64.

Symbols, as in the papers:

========== =====================================================================================
`t`        training timestep, 0 (least noise) .. timesteps - 1 (pure noise)
`step`     position in the sampler's list, 0 .. steps - 1, in the order of execution
`beta`     variance that training adds at one timestep
`alpha_bar` product of (1 - beta) up to and including t: the remaining signal, as a power
`sigma`    standard deviation of the noise that one sampler step adds
========== =====================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Spacing = Literal["leading", "linspace", "linspace_leading"]
"""How the S steps of the sampler are spread over the T timesteps.

================== ================================ =============================== ==============
                   t given to the network           t of `alpha_bar`                last alpha_bar
================== ================================ =============================== ==============
leading            floor(i T / S) + 1               t                               alpha_bar[0]
linspace           round(i (T - 1) / (S - 1))       t                               1
linspace_leading   round(i (T - 1) / (S - 1))       floor(i T / S)                  alpha_bar[0]
================== ================================ =============================== ==============

The first is used by LDM's DDIM and by MoE-SR, the second by StableSR's DDPM, and the last by StableSR's DDIM,
which gives the network a t with more noise than z_t has. Halves are rounded to even.
"""

MAX_TIMESTEPS = 100_000
"""The largest number of training timesteps; the published models have 1000."""


@dataclass(frozen=True)
class Schedule:
    """The scaled-linear noise schedule `betas = linspace(sqrt(beta_start), sqrt(beta_end), timesteps) ** 2`.

    Raises ValueError unless 1 <= timesteps <= MAX_TIMESTEPS and 0 < beta_start <= beta_end < 1.
    """

    timesteps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0155
    spacing: Spacing = "leading"

    def __post_init__(self) -> None:
        if not 1 <= self.timesteps <= MAX_TIMESTEPS:
            raise ValueError(
                f"a schedule has at least 1 timestep and at most {MAX_TIMESTEPS}, got {self.timesteps}"
            )
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(
                f"betas must satisfy 0 < beta_start <= beta_end < 1, got {self.beta_start}, {self.beta_end}"
            )

    @cached_property
    def betas(self) -> np.ndarray:
        """Float64 [timesteps], read-only."""
        roots = np.linspace(
            np.sqrt(self.beta_start), np.sqrt(self.beta_end), self.timesteps, dtype=np.float64
        )
        return _read_only(roots**2)

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        """Float64 [timesteps], read-only, falling with t."""
        return _read_only(np.cumprod(1.0 - self.betas))


@dataclass(frozen=True, eq=False)
class StepTable:
    """The sampler's steps as columns, in the order of execution: row 0 has the highest t.

    `t` and `expert` are int64 [S]. `alpha_bar`, `alpha_bar_prev` (at the next, less noisy timestep), `sigma`
    and `extrapolation` are float64 [S]. `extrapolation` is the w of a multistep sampler, with which x0 is
    extrapolated from the x0 of the previous step; 0 means no extrapolation. Row 0 is the step
    at position `first` of the sampler's list.
    """

    t: np.ndarray
    expert: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray
    sigma: np.ndarray
    extrapolation: np.ndarray
    first: int = 0

    def __len__(self) -> int:
        return len(self.t)

    def after(self, count: int) -> StepTable:
        """The table without its first `count` steps; ValueError if no step would be left.

        The new first step has no step before it, so its extrapolation is 0.
        """
        if not 0 <= count < len(self):
            raise ValueError(f"{count} of {len(self)} steps cannot be left out; at least one has to run")
        if not count:
            return self
        columns = (self.t, self.expert, self.alpha_bar, self.alpha_bar_prev, self.sigma, self.extrapolation)
        kept = [column[count:].copy() for column in columns]
        kept[-1][0] = 0.0
        return StepTable(*map(_read_only, kept), first=self.first + count)


def respaced_timesteps(total: int, steps: int, spacing: Spacing = "leading") -> np.ndarray:
    """Pick `steps` of `total` training timesteps: int64 [steps], ascending, each in [0, total - 1].

    "leading": if `steps` divides `total`, this is the published sampler's `range(0, total, total // steps)
    + 1`. Otherwise that list would have more than `steps` entries; here entry i is `floor(i * total / steps)
    + 1`, which spreads exactly `steps` entries over the whole range. With `steps == total` there is no room
    for the offset of one, and every timestep is taken once. The other spacings run from 0 to `total - 1`; a
    single step is at `total - 1`.

    Raises ValueError unless 1 <= steps <= total.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be in 1..{total} (the number of training timesteps), got {steps}")
    if spacing != "leading":
        strides = np.full(steps, (total - 1) / max(steps - 1, 1))
        strides[0] = 0 if steps > 1 else total - 1
        # summed as in the published code, because its rounding errors decide how halves are rounded
        return np.cumsum(strides).round().astype(np.int64)
    offset = 1 if steps < total else 0
    return np.arange(steps, dtype=np.int64) * total // steps + offset


def step_table(
    schedule: Schedule,
    steps: int,
    eta: float,
    ranges: Sequence[tuple[int, int]],
    *,
    multistep: bool = False,
) -> StepTable:
    """Return the table for one run of the sampler (DDIM, Eq. 16; eta = 1 is DDPM on the respaced timesteps).

    `ranges` holds one `(t_from, t_to)` per expert, `t_to` exclusive. The schedule's spacing decides where the
    last step ends, as in the published samplers. `multistep` selects DPM-Solver++(2M), whose steps are evenly
    spaced in lambda and end at alpha_bar[0], whatever the spacing. Raises ValueError if steps or eta are out
    of range, or if a timestep belongs to no expert or to several.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in 0..1 (0 is DDIM, 1 is DDPM), got {eta}")
    spacing, total = schedule.spacing, schedule.timesteps
    ascending = respaced_timesteps(total, steps, spacing)
    if multistep:
        ascending, spacing = _even_in_lambda(schedule.alpha_bar, steps), "leading"
    positions = np.arange(steps) * total // steps if spacing == "linspace_leading" else ascending
    alpha_bar = schedule.alpha_bar[positions]
    end = 1.0 if spacing == "linspace" else schedule.alpha_bar[0]
    alpha_bar_prev = np.concatenate([[end], alpha_bar[:-1]])
    variance = (1.0 - alpha_bar_prev) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_prev)
    further = _extrapolation(alpha_bar, alpha_bar_prev) if multistep else np.zeros(steps)
    experts = _experts(ascending, ranges)
    columns = (ascending, experts, alpha_bar, alpha_bar_prev, eta * np.sqrt(variance), further)
    t, expert, a, a_prev, sigma, w = (_read_only(column[::-1].copy()) for column in columns)
    return StepTable(t, expert, a, a_prev, sigma, w)


def full_steps(experts: np.ndarray, interval: int) -> np.ndarray:
    """Mark the steps that compute all levels of their expert: bool [S], from the steps' experts, int64 [S].

    These are the first step of each expert and every `interval`-th step after it. The other steps reuse the
    deep features of the full step before them, which always belongs to the same expert.
    """
    full = np.ones(len(experts), bool)
    since = 0
    for step in range(1, len(experts)):
        since = since + 1 if experts[step] == experts[step - 1] else 0
        full[step] = since % interval == 0
    return full


def _even_in_lambda(alpha_bar: np.ndarray, steps: int) -> np.ndarray:
    """Return the distinct timesteps nearest to evenly spaced `lambda = log(a / (1 - a)) / 2`, ascending.

    They run from pure noise to one step before alpha_bar[0], at which the last step ends. With steps evenly
    spaced in t the last steps would be several times longer in lambda, which makes a sampler of higher order
    less accurate.
    """
    order, last = np.arange(steps), len(alpha_bar) - 1
    curve = np.log(alpha_bar / (1.0 - alpha_bar)) / 2.0  # decreases with t
    wanted = np.linspace(curve[0], curve[-1], steps + 1)[1:]
    right = np.clip(np.searchsorted(-curve, -wanted), 1, max(last, 1))
    nearest = right - (wanted - curve[right] > curve[right - 1] - wanted) if last else order
    apart = np.maximum.accumulate(nearest - order) + order
    return np.minimum(apart, last - order[::-1]).astype(np.int64)


def _extrapolation(alpha_bar: np.ndarray, alpha_bar_prev: np.ndarray) -> np.ndarray:
    """Return `w = h / (2 h_before)` of `samplers` for ascending timesteps.

    0 for the first and the last step.
    """
    w = np.zeros(len(alpha_bar))
    now, then = (np.log(a / (1.0 - a)) for a in (alpha_bar, alpha_bar_prev[1:]))
    h = np.concatenate([[np.inf], then - now[1:]])  # the last step, here in front, is not used
    w[1:-1] = h[1:-1] / (2.0 * h[2:])
    return w


def _experts(timesteps: np.ndarray, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the index of the range that holds each timestep: int64 [S]."""
    bounds = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
    holds = (bounds[:, :1] <= timesteps) & (timesteps < bounds[:, 1:])  # [experts, S]
    owners = holds.sum(axis=0)
    if np.any(owners != 1):
        t = int(timesteps[owners != 1][0])
        found = "no expert" if not holds[:, timesteps == t].any() else "several experts"
        raise ValueError(
            f"timestep {t} belongs to {found}; the ranges {list(ranges)} (end exclusive) must hold every "
            "sampled timestep exactly once"
        )
    return holds.argmax(axis=0).astype(np.int64)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
