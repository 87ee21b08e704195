"""The schedule's tables equal those of the published samplers, and the rules for steps and expert ranges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesr.runtime.sampling.samplers import coefficients
from moesr.runtime.sampling.schedule import Schedule, respaced_timesteps, step_table

DDPM_COLUMNS = (
    "timesteps",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "posterior_variance",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
QUARTERS = [(0, 250), (250, 500), (500, 750), (750, 1000)]


def test_alpha_bar_matches_published_table(golden):
    published = golden("schedule")
    schedule = Schedule()
    np.testing.assert_allclose(schedule.alpha_bar, published["alphas_cumprod"], rtol=1e-12)
    np.testing.assert_allclose(schedule.betas[[0, -1]], published["betas_first_last"], rtol=1e-12)


@pytest.mark.parametrize("steps", [200, 100, 50, 20])
def test_step_table_matches_published_ddpm(golden, steps):
    published = golden("schedule")
    table = step_table(Schedule(), steps, 1.0, QUARTERS)
    np.testing.assert_array_equal(table.t[::-1], published[f"t_{steps}"])
    # The published sigmas mix float32 and float64 alphas; for alphas near 1 the error is a few 1e-6.
    np.testing.assert_allclose(table.sigma[::-1], published[f"sigma_{steps}"], rtol=1e-5)
    assert len(table) == steps


@pytest.mark.parametrize(("stem", "steps", "eta"), [("ddim_s8_eta1", 8, 1.0), ("ddim_s5_eta0", 5, 0.0)])
def test_step_table_matches_published_loops(golden, stem, steps, eta):
    published = golden(stem)
    table = step_table(Schedule(), steps, eta, QUARTERS)
    np.testing.assert_array_equal(table.t[::-1], published["timesteps"])
    np.testing.assert_allclose(table.alpha_bar[::-1], published["alphas"], atol=1e-7)
    np.testing.assert_allclose(table.alpha_bar_prev[::-1], published["alphas_prev"], atol=1e-7)
    np.testing.assert_allclose(table.sigma[::-1], published["sigmas"], atol=1e-6)


STABLESR = Schedule(beta_start=0.00085, beta_end=0.012, spacing="linspace")


def test_alpha_bar_of_stable_diffusion(golden):
    published = golden("stablesr_schedule")
    np.testing.assert_allclose(STABLESR.betas, published["s1000.betas"], rtol=1e-6)
    np.testing.assert_allclose(STABLESR.alpha_bar, published["s1000.alphas_cumprod"], rtol=1e-6)


@pytest.mark.parametrize("steps", [200, 50, 6, 4])
def test_linspace_table_matches_published_ddpm(golden, steps):
    published = {key: golden("stablesr_schedule")[f"s{steps}.{key}"] for key in DDPM_COLUMNS}
    table = step_table(STABLESR, steps, 1.0, [(0, 1000)])
    np.testing.assert_array_equal(table.t[::-1], published["timesteps"])
    np.testing.assert_allclose(table.alpha_bar[::-1], published["alphas_cumprod"], rtol=1e-5)
    np.testing.assert_allclose(table.alpha_bar_prev[::-1], published["alphas_cumprod_prev"], rtol=1e-5)
    np.testing.assert_allclose(table.sigma[::-1] ** 2, published["posterior_variance"], rtol=1e-4)
    # The same step, written with the coefficients of DDPM's posterior: the mean is c1 x0 + c2 z with x0 = (z
    # - sqrt(1 - a) eps) / sqrt(a).
    steps_of = [coefficients(table, step) for step in reversed(range(steps))]
    a, c1 = published["alphas_cumprod"].astype(np.float64), published["posterior_mean_coef1"]
    c_z = c1 / np.sqrt(a) + published["posterior_mean_coef2"]
    np.testing.assert_allclose([c.c_z for c in steps_of], c_z, rtol=5e-5)
    np.testing.assert_allclose([c.c_out for c in steps_of], -c1 * np.sqrt(1 / a - 1), rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [50, 20, 5])
def test_linspace_leading_table_matches_published_ddim(golden, steps):
    published = golden("stablesr_schedule")
    schedule = dataclasses.replace(STABLESR, spacing="linspace_leading")
    table = step_table(schedule, steps, 1.0, [(0, 1000)])
    np.testing.assert_array_equal(table.t[::-1], published[f"ddim{steps}.model_timesteps"])
    at = published[f"ddim{steps}.table_timesteps"]
    np.testing.assert_array_equal(table.alpha_bar[::-1], schedule.alpha_bar[at])
    np.testing.assert_allclose(table.alpha_bar[::-1], published[f"ddim{steps}.alphas"], rtol=1e-6)
    np.testing.assert_allclose(table.alpha_bar_prev[::-1], published[f"ddim{steps}.alphas_prev"], rtol=1e-6)
    # The published alphas are float32; for alphas near 1 the error is a few 1e-5.
    sigmas = published[f"ddim{steps}.sigmas_eta1"]
    np.testing.assert_allclose(table.sigma[::-1], sigmas, rtol=5e-5, atol=1e-12)


@pytest.mark.parametrize("total", [1000, 37])
def test_linspace_covers_the_whole_range(total):
    for steps in range(2, total + 1):
        t = respaced_timesteps(total, steps, "linspace")
        assert t.dtype == np.int64 and (t[0], t[-1], len(t)) == (0, total - 1, steps)
        assert np.diff(t).min() >= 1
        summed, position = [], 0.0
        for _ in range(steps):
            summed.append(round(position))
            position += (total - 1) / (steps - 1)
        assert t.tolist() == summed
    assert respaced_timesteps(total, 1, "linspace").tolist() == [total - 1]  # sampling starts from noise


def test_last_step_of_linspace_gives_the_clean_latent():
    table = step_table(STABLESR, 5, 1.0, [(0, 1000)])
    c = coefficients(table, 4)
    assert table.alpha_bar_prev[-1] == 1.0 and c.c_noise == 0
    assert c.c_z == np.float32(1 / np.sqrt(STABLESR.alpha_bar[0]))


@pytest.mark.parametrize("total", [1000, 37, 1])
def test_any_number_of_steps_is_spread_over_the_range(total):
    for steps in range(1, total + 1):
        t = respaced_timesteps(total, steps)
        assert t.dtype == np.int64 and len(t) == steps
        assert t[0] >= 0 and t[-1] < total
        assert t[-1] >= total - total / steps - 1  # sampling starts within one stride of pure noise
        gaps = np.diff(t)
        assert steps == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
        if total % steps == 0 and steps < total:
            np.testing.assert_array_equal(t, np.arange(0, total, total // steps) + 1)


@pytest.mark.parametrize("total", [1000, 37, 1])
def test_multistep_steps_are_evenly_spaced_in_lambda(total):
    schedule = Schedule(timesteps=total)
    for steps in range(1, total + 1):
        table = step_table(schedule, steps, 0.0, [(0, total)], multistep=True)
        assert len(table) == steps and table.t[0] == total - 1 and table.t[-1] >= 0
        assert np.all(np.diff(table.t) < 0)
        assert table.alpha_bar_prev[-1] == schedule.alpha_bar[0]
        assert table.extrapolation[0] == table.extrapolation[-1] == 0
    if total == 1000:
        table = step_table(schedule, 12, 0.0, [(0, total)], multistep=True)
        edges = np.append(table.alpha_bar, schedule.alpha_bar[0])
        curve = np.log(edges / (1 - edges)) / 2
        np.testing.assert_allclose(np.diff(curve), (curve[-1] - curve[0]) / 12, rtol=0.25)
        np.testing.assert_allclose(table.extrapolation[1:-1], np.diff(curve)[1:-1] / np.diff(curve)[:-2] / 2)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"1..1000.*got {steps}"):
        respaced_timesteps(1000, steps)


def test_table_is_in_execution_order_and_ends_at_first_alpha_bar():
    schedule = Schedule(timesteps=40)
    table = step_table(schedule, 7, 0.5, [(0, 40)])
    assert np.all(np.diff(table.t) < 0)
    np.testing.assert_array_equal(table.alpha_bar, schedule.alpha_bar[table.t])
    np.testing.assert_array_equal(table.alpha_bar_prev[:-1], table.alpha_bar[1:])
    assert table.alpha_bar_prev[-1] == schedule.alpha_bar[0]


def test_with_every_timestep_the_last_step_changes_nothing():
    table = step_table(Schedule(timesteps=10), 10, 1.0, [(0, 10)])
    np.testing.assert_array_equal(table.t, np.arange(9, -1, -1))
    assert table.sigma[-1] == 0 and np.all(table.sigma[:-1] > 0)


def test_experts_follow_their_ranges():
    table = step_table(Schedule(), 1000, 1.0, [(0, 100), (100, 101), (101, 1000)])
    np.testing.assert_array_equal(table.expert, np.where(table.t < 100, 0, np.where(table.t == 100, 1, 2)))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 500), (501, 1000)], "timestep 500 belongs to no expert"),
        ([(0, 501), (500, 1000)], "timestep 500 belongs to several experts"),
        ([], "timestep 0 belongs to no expert"),
    ],
    ids=["gap", "overlap", "none"],
)
def test_ranges_must_contain_each_timestep_once(ranges, message):
    with pytest.raises(ValueError, match=message):
        step_table(Schedule(), 1000, 1.0, ranges)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match="eta"):
        step_table(Schedule(), 10, eta, QUARTERS)


@pytest.mark.parametrize(
    "options",
    [{"timesteps": 0}, {"beta_start": 0.0}, {"beta_start": 0.1, "beta_end": 0.01}, {"beta_end": 1.0}],
    ids=str,
)
def test_impossible_schedule_is_refused(options):
    with pytest.raises(ValueError, match=r"timestep|betas"):
        Schedule(**options)


def test_tables_are_read_only():
    schedule = Schedule()
    for array in (schedule.alpha_bar, step_table(schedule, 10, 1.0, QUARTERS).sigma):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0
