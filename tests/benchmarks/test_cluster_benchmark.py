"""The simulation of a cluster agrees with what can be reckoned by hand."""

from __future__ import annotations

import pytest
from cluster_suite.simulation import Costs, images_per_s

FREE = Costs(keys_per_s=1e9, driver_s=0.0, restart_s=0.0, lifetime_s=1e12)


@pytest.mark.parametrize("workers", [1, 30])
def test_workers_without_costs_lose_only_the_last_round(workers):
    rate = images_per_s(workers, 2.0, FREE)
    assert 0.9 * workers / 2 < rate <= 1.05 * workers / 2


def test_the_slowest_part_is_the_limit():
    listing = Costs(50.0, 0.0, 0.0, lifetime_s=1e12)
    assert images_per_s(200, 1.0, listing) == pytest.approx(50.0, rel=0.05)
    driver = Costs(1e9, 0.01, 0.0, lifetime_s=1e12)
    assert images_per_s(300, 1.0, driver) == pytest.approx(100.0, rel=0.05)


def test_deaths_cost_an_image_and_a_restart():
    mortal = Costs(1e9, 0.0, restart_s=10.0, lifetime_s=100.0)
    free = images_per_s(20, 1.0, FREE, 400)
    assert 0.75 * free < images_per_s(20, 1.0, mortal, 400) < 0.95 * free
