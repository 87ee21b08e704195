"""The schedule's tables against the published sampler's, and the rules for steps and expert ranges."""

from __future__ import annotations

import numpy as np
import pytest

from moesr.runtime.schedule import Schedule, respaced_timesteps, step_table

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
    # The published sigmas mix float32 and float64 alphas; close to 1 that costs a few 1e-6.
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


def test_every_timestep_once_ends_in_a_step_that_changes_nothing():
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
def test_ranges_must_hold_every_timestep_once(ranges, message):
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


def test_tables_cannot_be_written():
    schedule = Schedule()
    for array in (schedule.alpha_bar, step_table(schedule, 10, 1.0, QUARTERS).sigma):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0
