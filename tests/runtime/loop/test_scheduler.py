"""The scheduler: order within a flow, fair shares of flows, priorities, full ticks, few loads of graphs.

Time is counted in tiles, and nothing is computed: the test tells jobs that their tiles ran.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engines import build_engine

from moesr.runtime.devices.host import HostDevice
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.loop.cost_model import Costs
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.scheduler import CATCH_UP, PATIENCE, Scheduler
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.loop.work import PRIORITIES, Flow


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return read_manifest(build_engine(tmp_path_factory.mktemp("engine")))  # 16 LR pixels per tile


class Waiting:
    """The part of a job that the scheduler reads."""

    def __init__(self, flow: Flow, group: str, rounds: int, remaining: int) -> None:
        self.flow, self.rounds, self.planned = flow, rounds, {group: 100}
        self.current = SimpleNamespace(
            group=group, role=group, remaining=remaining, take=lambda count: range(count)
        )


def picked(jobs: list[Any], limit: int) -> list[tuple[int, int]]:
    costs: Any = SimpleNamespace(per_tile=lambda: dict.fromkeys("ab", 1.0))
    batches = Scheduler(costs, lambda role: 0.0, limit).next_batches(jobs)
    return [(jobs.index(batch.job), batch.count) for batch in batches]


def test_oldest_job_of_a_flow_leads_and_others_fill_the_tick():
    flow = Flow()
    jobs = [Waiting(flow, "a", 5, 2), Waiting(flow, "b", 5, 1), Waiting(flow, "a", 4, 9)]
    jobs.append(Waiting(flow, "a", 5, 1))
    assert picked(jobs, 1) == [(0, 1)]
    assert picked(jobs, 4) == [(0, 2), (2, 2)]
    assert picked(jobs, 12) == [(0, 2), (2, 9), (3, 1)]


def test_slightly_later_jobs_catch_up():
    flow = Flow()
    late, far = Waiting(flow, "a", 6 - CATCH_UP, 1), Waiting(flow, "a", 5 - CATCH_UP, 1)
    jobs = [Waiting(flow, "b", 6, 1), late, far]
    assert picked(jobs, 4) == [(1, 1), (2, 1)]
    assert picked(jobs, 1) == [(0, 1)]  # no free slots could be gained
    assert picked([jobs[0], far], 4) == [(0, 1)]  # too far behind to wait for it
    assert picked([jobs[0], Waiting(flow, "a", 7, 1)], 4) == [(0, 1)]


def test_tiles_in_flight_are_not_picked_again():
    """Sessions on other machines may have several ticks in flight."""
    flow = Flow()
    assert picked([Waiting(flow, "a", 0, 0), Waiting(flow, "a", 0, 3)], 2) == [(1, 2)]
    assert picked([Waiting(flow, "a", 0, 0)], 2) == []


class Machine:
    """Runs the ticks that a scheduler picks, one unit of time per tile; at most `kept` graphs stay loaded."""

    def __init__(self, manifest: Manifest, max_batch: int = 1, load_s: float = 0.0, kept: int = 99) -> None:
        self.manifest, self.device = manifest, HostDevice()
        self.costs = Costs(manifest.graphs)
        for role in manifest.graphs:
            self.costs.observe(role, 1, 1.0)
        self.scheduler = Scheduler(self.costs, self.reload_s, max_batch)
        self.loaded: list[str] = []
        self.load_s, self.kept = load_s, kept
        self.jobs: list[Job] = []
        self.time, self.loads, self.ended = 0.0, 0, {}

    def reload_s(self, role: str) -> float:
        return 0.0 if role in self.loaded else self.load_s

    def submit(self, side: int, flow: Flow | None = None, steps: int = 8) -> Job:
        """Submit an image of `side` x `side` LR pixels."""
        layout = TileLayout(self.manifest, side, side)
        lr, condition = np.zeros((*layout.frame.canvas, 3), np.uint8), np.zeros((*layout.latent, 3), np.uint8)
        job = Job(layout, lr, condition, Settings(steps, "ddim", 1, 1.0), flow)
        job.begin(self.device)
        self.jobs.append(job)
        return job

    def tick(self) -> None:
        batches = self.scheduler.next_batches(self.jobs)
        role = batches[0].job.current.role
        if role not in self.loaded:
            upcoming = batches[0].job.upcoming
            self.loads += 1
            self.time += self.load_s
            self.loaded = [*[r for r in self.loaded if r != upcoming], role][-self.kept :]
        self.time += sum(batch.count for batch in batches)
        for batch in batches:
            batch.job.accept(batch.count)
            if batch.job.finished:
                self.ended[batch.job] = self.time
                self.jobs.remove(batch.job)

    def run(self, until: Job | None = None) -> float:
        while self.jobs and until not in self.ended:
            self.tick()
        return self.time


LARGE, SMALL = 8 * 16, 16  # sides in LR pixels: 100 tiles, and one tile


@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("side", [SMALL, 40], ids=["one-tile", "nine-tiles"])
@pytest.mark.parametrize("before", [0, 1, 50, 333, 700])
def test_small_image_behind_a_large_one_takes_at_most_three_times_as_long(
    manifest: Manifest, max_batch: int, side: int, before: int
):
    alone = Machine(manifest, max_batch)
    alone.submit(side)
    machine = Machine(manifest, max_batch)
    large = machine.submit(LARGE)
    for _ in range(before // max_batch):
        machine.tick()
    arrived = machine.time
    small = machine.submit(side)
    machine.run(small)
    assert large not in machine.ended
    passed, usual = machine.ended[small] - arrived, alone.run()
    assert passed <= 3 * usual
    if max_batch == 1 and arrived > 2 * usual:  # the turn of the large one is over
        assert passed == usual


@pytest.mark.parametrize("before", [10, 123, 400])
def test_graphs_are_not_swapped_for_fairness(manifest: Manifest, before: int):
    """Only one graph fits. The small image waits for its turn, and loading takes a fifth of the time."""
    machine = Machine(manifest, load_s=5.0, kept=1)
    machine.submit(LARGE)
    while machine.time < before:
        machine.tick()
    arrived, loads = machine.time, machine.loads
    smalls = [machine.submit(SMALL) for _ in range(3)]
    for small in smalls:
        machine.run(small)
    passed = machine.time - arrived
    assert (machine.loads - loads) * 5.0 <= passed / (
        PATIENCE + 1
    ) + 5 * 5.0  # 5 graphs must be loaded in any case
    assert passed < 300  # the large one alone takes 900


def test_equal_images_finish_one_after_the_other(manifest: Manifest):
    """If they took turns, all would finish at the end."""
    machine = Machine(manifest)
    jobs = [machine.submit(40) for _ in range(4)]
    total = machine.run()
    ended = [machine.ended[job] for job in jobs]
    np.testing.assert_allclose(ended, total / 4 * np.arange(1, 5), rtol=0.05)


def test_images_of_one_flow_finish_in_order(manifest: Manifest):
    machine, flow = Machine(manifest), Flow()
    jobs = [machine.submit(side, flow) for side in (LARGE, SMALL, 40)]
    machine.run()
    assert list(machine.ended) == jobs


def test_flows_share_time_equally_whatever_their_number_of_images(manifest: Manifest):
    """A folder of nine images and a single image of the same size get half of the machine each."""
    machine, folder = Machine(manifest), Flow()
    for _ in range(9):
        machine.submit(40, folder)
    alone = machine.submit(40)
    machine.run(alone)
    assert len(machine.ended) <= 3


@pytest.mark.parametrize("priority", PRIORITIES)
def test_priorities_are_weights(manifest: Manifest, priority: str):
    machine = Machine(manifest)
    favoured, other = machine.submit(LARGE, Flow(priority)), machine.submit(LARGE)
    quantum = sum(other.planned.values())
    machine.scheduler._ring.clear()
    small = machine.submit(SMALL)  # determines the length of turns
    machine.run(small)
    while machine.time < quantum / 2:
        small = machine.submit(SMALL) if small in machine.ended else small
        machine.tick()
    ratio = favoured.ran.total() / other.ran.total()
    assert ratio == pytest.approx(PRIORITIES[priority], rel=0.3)


def test_ticks_are_filled_with_equal_jobs_of_other_flows_but_not_larger_ones(manifest: Manifest):
    machine = Machine(manifest, max_batch=8)
    for _ in range(8):
        machine.submit(SMALL)
    assert [batch.count for batch in machine.scheduler.next_batches(machine.jobs)] == [1] * 8
    machine = Machine(manifest, max_batch=8)
    jobs = [machine.submit(SMALL), machine.submit(LARGE)]
    assert {b.job: b.count for b in machine.scheduler.next_batches(jobs)} == dict.fromkeys(jobs, 1)


def test_many_small_images_do_not_block_a_large_one(manifest: Manifest):
    machine = Machine(manifest)
    large = machine.submit(LARGE)
    small = machine.submit(SMALL)
    while large not in machine.ended:
        if small in machine.ended:
            small = machine.submit(SMALL)
        machine.tick()
    assert machine.time < 2.5 * sum(large.planned.values())


def test_zero_costs_do_not_stop_the_turns(manifest: Manifest):
    machine = Machine(manifest)
    machine.costs._seconds = dict.fromkeys(manifest.graphs, 0.0)
    machine.submit(40), machine.submit(SMALL)
    machine.run()
    assert len(machine.ended) == 2
