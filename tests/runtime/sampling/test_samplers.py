"""The sampler's in-place update against the textbook formulas in float64."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from conftest import relative_l2

from moesr.runtime.sampling.samplers import SAMPLERS, Prediction, advance, coefficients
from moesr.runtime.sampling.schedule import Schedule, StepTable, step_table

SHAPE = (3, 24, 20)


def make_table(steps: int, eta: float) -> StepTable:
    return step_table(Schedule(), steps, eta, [(0, 1000)])


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def ddim_float64(
    z: np.ndarray, eps: np.ndarray, noise: np.ndarray, a: float, a_prev: float, eta: float
) -> np.ndarray:
    """DDIM, Eq. 12 and 16 of the paper."""
    sigma = eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
    x0 = (z - np.sqrt(1 - a) * eps) / np.sqrt(a)
    return np.sqrt(a_prev) * x0 + np.sqrt(1 - a_prev - sigma**2) * eps + sigma * noise


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_loop_matches_ddim_in_float64(steps, eta):
    table = make_table(steps, eta)
    z, scratch = normal(0), np.empty(SHAPE, np.float32)
    want = z.astype(np.float64)
    for step in range(steps):
        noise = normal(100 + step)
        a, a_prev = table.alpha_bar[step], table.alpha_bar_prev[step]
        want = ddim_float64(want, np.tanh(want), noise, a, a_prev, eta)
        advance(z, np.tanh(z), noise, coefficients(table, step), scratch)
    assert relative_l2(z, want) < 1e-5


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("step", [0, 10, 19])
def test_all_predictions_give_the_same_step(step: int, eta: float, prediction: Prediction):
    table = make_table(20, eta)
    a, a_prev = table.alpha_bar[step], table.alpha_bar_prev[step]
    x0, eps = normal(1).astype(np.float64), normal(2).astype(np.float64)
    z = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
    noise = normal(3)
    want = ddim_float64(z, eps, noise, a, a_prev, eta)
    out = {"eps": eps, "x0": x0, "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x0}[prediction]
    got, scratch = z.astype(np.float32), np.empty(SHAPE, np.float32)
    advance(got, out.astype(np.float32), noise, coefficients(table, step, prediction), scratch)
    # For eps, the rounding error of z_t grows by sqrt(a_prev / a) at the first steps.
    assert relative_l2(got, want) < 1e-6 / np.sqrt(a)


def test_deterministic_sampler_with_the_true_eps_returns_to_x0():
    table = make_table(50, SAMPLERS["ddim"].eta)
    x0, eps, scratch = normal(1), normal(2), np.empty(SHAPE, np.float32)
    first, last = table.alpha_bar[0], table.alpha_bar_prev[-1]
    z = (np.sqrt(first) * x0 + np.sqrt(1 - first) * eps).astype(np.float32)
    for step in range(len(table)):
        advance(z, eps, None, coefficients(table, step), scratch)
    assert relative_l2(z, np.sqrt(last) * x0 + np.sqrt(1 - last) * eps) < 1e-4


@pytest.mark.parametrize("steps", [200, 50, 7, 1000])
def test_ddpm_sigma_is_the_posterior_of_the_respaced_chain(steps):
    table = make_table(steps, SAMPLERS["ddpm"].eta)
    # q(x_{t-1} | x_t, x0) is the product of two Gaussians, so their precisions add: that of the prior
    # q(x_{t-1} | x0) and that of the likelihood q(x_t | x_{t-1}) of the respaced chain.
    alpha = table.alpha_bar / table.alpha_bar_prev
    moves = alpha < 1
    precision = alpha[moves] / (1 - alpha[moves]) + 1 / (1 - table.alpha_bar_prev[moves])
    np.testing.assert_allclose(table.sigma[moves], precision**-0.5, rtol=1e-9)
    assert not table.sigma[~moves].any()


def test_ddpm_mean_is_the_posterior_mean():
    table = make_table(50, SAMPLERS["ddpm"].eta)
    step = 20
    a, a_prev = table.alpha_bar[step], table.alpha_bar_prev[step]
    alpha, x0, eps = a / a_prev, normal(3), normal(4)
    z = (np.sqrt(a) * x0 + np.sqrt(1 - a) * eps).astype(np.float32)
    # DDPM, Eq. 7
    mean = np.sqrt(a_prev) * (1 - alpha) / (1 - a) * x0 + np.sqrt(alpha) * (1 - a_prev) / (1 - a) * z
    advance(z, eps, np.zeros(SHAPE, np.float32), coefficients(table, step), np.empty(SHAPE, np.float32))
    assert relative_l2(z, mean) < 1e-5


def test_missing_noise_is_refused_if_the_step_adds_noise():
    c = coefficients(make_table(10, 1.0), 0)
    with pytest.raises(ValueError, match="adds noise"):
        advance(normal(0), normal(1), None, c, np.empty(SHAPE, np.float32))


def test_missing_history_is_refused_if_the_step_needs_it():
    table = step_table(Schedule(), 10, 0.0, [(0, 1000)], multistep=True)
    first, second, last = (coefficients(table, step) for step in (0, 1, 9))
    assert first.c_history == last.c_history == 0
    with pytest.raises(ValueError, match="x0 of the previous step"):
        advance(normal(0), normal(1), None, second, np.empty(SHAPE, np.float32))


def test_only_z_and_scratch_are_written_and_nothing_is_allocated():
    shape = (3, 256, 256)
    z, eps, noise = (np.full(shape, v, np.float32) for v in (1.0, 2.0, 3.0))
    scratch = np.empty(shape, np.float32)
    c = coefficients(make_table(10, 1.0), 3)
    tracemalloc.start()
    advance(z, eps, noise, c, scratch)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < z.nbytes // 10
    assert np.all(eps == 2.0) and np.all(noise == 3.0)
    np.testing.assert_allclose(z, c.c_z + 2 * c.c_out + 3 * c.c_noise, rtol=1e-6)
