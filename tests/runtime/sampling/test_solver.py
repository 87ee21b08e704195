"""The samplers on a problem with a known solution: Gaussian data, for which score and paths are formulas.

With x0 ~ N(mu, s^2) the best estimate of x0 is linear in z_t, and along a deterministic path (z - sqrt(a) mu)
/ sqrt(s^2 a + 1 - a) is constant. So the error of a sampler comes from its steps alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from moesr.runtime.sampling.samplers import SAMPLERS, Prediction, advance, coefficients
from moesr.runtime.sampling.schedule import Schedule, StepTable

MU, S = 0.5, 0.5
START = np.array([1.3, -0.7])
RANGES = [(0, 250), (250, 500), (500, 750), (750, 1000)]


def table_of(sampler: str, steps: int, schedule: Schedule) -> StepTable:
    share = schedule.timesteps // 1000
    ranges = [(a * share, b * share) for a, b in RANGES]
    return SAMPLERS[sampler].table(schedule, steps, ranges)


def schedule_of(timesteps: int) -> Schedule:
    """Return the published schedule in finer steps."""
    return Schedule(timesteps, 0.0015 * 1000 / timesteps, 0.0155 * 1000 / timesteps)


def sampled(table: StepTable, mus: Sequence[float], prediction: Prediction = "eps") -> np.ndarray:
    """Sample from START; each expert assumes that the data is N(mu, S^2) with its own mu."""
    z, history, scratch = START.copy(), np.zeros(2), np.empty(2)
    for step in range(len(table)):
        a, mu = table.alpha_bar[step], mus[table.expert[step]]
        x0 = mu + S**2 * np.sqrt(a) * (z - np.sqrt(a) * mu) / (S**2 * a + 1 - a)
        eps = (z - np.sqrt(a) * x0) / np.sqrt(1 - a)
        out = {"eps": eps, "x0": x0, "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x0}[prediction]
        advance(z, out, None, coefficients(table, step, prediction), scratch, history)
    return z


def exact(table: StepTable, mus: Sequence[float], schedule: Schedule) -> np.ndarray:
    """Return the end of the exact path from START, on which experts change exactly at their borders."""
    z, a = START, table.alpha_bar[0]
    share = schedule.timesteps // 1000
    for (t_from, _), mu in reversed(list(zip(RANGES, mus, strict=True))):
        b = schedule.alpha_bar[max(t_from * share - 1, 0)]
        z = np.sqrt(b) * mu + np.sqrt((S**2 * b + 1 - b) / (S**2 * a + 1 - a)) * (z - np.sqrt(a) * mu)
        a = b
    return z


def error(
    sampler: str, steps: int, *, timesteps: int = 1000, jump: float = 0.0, restart: bool = False
) -> float:
    """Return the largest error of a sampler whose experts' `mu` differ by `jump`.

    With `restart` the sampler drops its history at each border between experts.
    """
    schedule = schedule_of(timesteps)
    table, mus = table_of(sampler, steps, schedule), [MU + jump * (k % 2) for k in range(4)]
    if restart:
        same = np.concatenate([[False], table.expert[1:] == table.expert[:-1]])
        table = dataclasses.replace(table, extrapolation=table.extrapolation * same)
    return float(np.abs(sampled(table, mus) - exact(table, mus, schedule)).max())


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++2m", 2)])
def test_order_of_convergence(sampler: str, order: int):
    """Across three borders between experts, doubling the steps divides the error by 2 ** order."""
    errors = [error(sampler, steps, timesteps=100_000) for steps in (32, 64, 128)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.2)


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_second_order_is_better_for_few_steps(steps: int):
    assert error("dpm++2m", steps) < 0.4 * error("ddim", steps)


@pytest.mark.parametrize("jump", [0.0, 0.05, 0.1, 0.2])
def test_history_is_useful_across_experts(jump: float):
    """The history is an estimate of x0 by any expert: keeping it at borders is better than dropping it."""
    kept, anew = error("dpm++2m", 10, jump=jump), error("dpm++2m", 10, jump=jump, restart=True)
    assert kept < 0.5 * anew


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_predictions_agree(prediction: Prediction):
    table = table_of("dpm++2m", 10, Schedule())
    np.testing.assert_allclose(sampled(table, [MU] * 4, prediction), sampled(table, [MU] * 4), rtol=1e-4)
