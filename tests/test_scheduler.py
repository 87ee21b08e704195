"""Jobs and batches: the sampler's algebra on a canvas, order, sharing of batches, residency, failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import relative_l2
from engines import build_engine

from moesr.runtime import noise, samplers
from moesr.runtime.errors import EngineError, NonFiniteError
from moesr.runtime.manifest import Expert, Graph, Manifest
from moesr.runtime.residency import Residency
from moesr.runtime.schedule import step_table
from moesr.runtime.scheduler import Job, Sampling, Scheduler, Settings, sampling_grid, work_units
from moesr.runtime.sessions import graph_shapes

RNG = np.random.default_rng(3)


class FakeSession:
    """Session over plain functions: `function(inputs of one sample)`; records the size of each batch."""

    def __init__(self, manifest: Manifest, graph: Graph, max_batch: int, function: Callable) -> None:
        shapes = graph_shapes(manifest, graph)
        sized = {n: [max_batch if s is None else s for s in shape] for n, shape in shapes.inputs.items()}
        self._inputs = {name: np.full(shape, np.nan, np.float32) for name, shape in sized.items()}
        self.max_batch, self.batches, self._function = max_batch, [], function

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        return self._inputs

    def run(self, batch: int) -> np.ndarray:
        self.batches.append(batch)
        rows = ({n: a[i] if n != "fidelity" else a for n, a in self._inputs.items()} for i in range(batch))
        return np.stack([self._function(row) for row in rows])


def eps_of(row: Mapping[str, np.ndarray]) -> np.ndarray:
    return 0.9 * row["z_t"] + 0.1 * row["cond"] + np.float32(1e-4) * row["t"]


def image_of(row: Mapping[str, np.ndarray]) -> np.ndarray:
    return row["fidelity"][0] * row["lr"] + 0.05 * row["z"].repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.read(build_engine(tmp_path / "engine"))  # 16 latent pixels a tile


class Rig:
    """A scheduler over fake sessions, which it keeps for inspection."""

    def __init__(self, manifest: Manifest, max_batch: int = 1, keep_all: bool = True, expert=eps_of) -> None:
        self.manifest, self.sessions, self.opened = manifest, {}, []

        def open_graph(graph: Graph) -> FakeSession:
            function = expert if isinstance(graph, Expert) else image_of
            self.opened.append(graph.file)
            self.sessions[graph.file] = FakeSession(manifest, graph, max_batch, function)
            return self.sessions[graph.file]

        self.residency = Residency(open_graph, keep_all)
        self.scheduler = Scheduler(self.residency, "fp16")

    def job(self, height: int, width: int, **options) -> Job:
        values = {"steps": 4, "sampler": "ddpm", "seed": 1, "color_fix": "none", "fidelity": 1.0} | options
        cond = RNG.uniform(-1, 1, (3, height, width)).astype(np.float32)
        lr = RNG.integers(0, 256, (height * 4, width * 4, 3), np.uint8)
        return Job(self.manifest, cond, lr, Settings(**values))

    def run(self, *jobs: Job) -> None:
        for job in jobs:
            self.scheduler.submit(job)
        for job in jobs:
            self.scheduler.run(job, lambda: None)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("size", [(16, 16), (16, 17), (40, 23)], ids=str)
def test_canvas_equals_the_plain_loop(manifest: Manifest, size: tuple[int, int], sampler: str):
    rig = Rig(manifest)
    job = rig.job(*size, sampler=sampler, steps=7)
    assert isinstance(job.phase, Sampling)
    cond, z = job.phase._cond, job.phase.z.astype(np.float64)
    rig.run(job)

    table = step_table(manifest.schedule, 7, samplers.ETA[sampler], manifest.expert_ranges)
    for step in range(7):
        c = samplers.coefficients(table, step)
        eps = 0.9 * z + 0.1 * cond + 1e-4 * table.t[step]
        z = c.c_z * z + c.c_eps * eps + c.c_noise * noise.gaussian(1, step, z.shape)
    want = job.lr.transpose(2, 0, 1) / 127.5 - 1 + 0.05 * z.repeat(4, axis=1).repeat(4, axis=2)
    assert relative_l2(job.image, want) < 1e-5


def test_result_does_not_depend_on_batch_or_company(manifest: Manifest):
    alone, together = Rig(manifest, 1), Rig(manifest, 3)
    state = RNG.bit_generator.state
    single = [alone.job(20, 40), alone.job(16, 16, seed=2), alone.job(33, 16, fidelity=0.5)]
    RNG.bit_generator.state = state
    shared = [together.job(20, 40), together.job(16, 16, seed=2), together.job(33, 16, fidelity=0.5)]
    for job in single:
        alone.run(job)
    together.run(*shared)
    for one, other in zip(single, shared, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_batches_fill_up_over_jobs(manifest: Manifest):
    rig = Rig(manifest, max_batch=4)
    rig.run(*[rig.job(16, 16, seed=k) for k in range(4)])
    assert all(set(session.batches) == {4} for session in rig.sessions.values())


def test_decoding_never_mixes_fidelities(manifest: Manifest):
    rig = Rig(manifest, max_batch=4)
    rig.run(rig.job(16, 16, fidelity=0.0), rig.job(16, 16, fidelity=1.0))
    assert rig.sessions["decoder.onnx"].batches == [1, 1]
    assert rig.sessions["expert_3.onnx"].batches == [2]


def test_units_count_every_tile(manifest: Manifest):
    rig = Rig(manifest)
    job = rig.job(40, 23, steps=6)
    rig.run(job)
    ran = sum(sum(session.batches) for session in rig.sessions.values())
    assert job.units == job.total == ran == work_units(manifest, 40, 23, 6)
    assert len(sampling_grid(manifest, 40, 23)) == 6


def test_only_visited_experts_are_loaded(manifest: Manifest):
    rig = Rig(manifest)
    rig.run(rig.job(16, 16, steps=1))
    assert set(rig.opened) == {"expert_0.onnx", "decoder.onnx"}


@pytest.mark.parametrize(("keep_all", "most"), [(True, 5), (False, 2)], ids=["resident", "rotating"])
def test_residency(manifest: Manifest, keep_all: bool, most: int):
    rig = Rig(manifest, keep_all=keep_all)
    job = rig.job(16, 16)
    loaded: list[int] = []
    rig.scheduler.submit(job)
    rig.scheduler.run(job, lambda: loaded.append(len(rig.residency.loaded)))
    assert max(loaded) == most
    assert rig.opened == ["expert_3.onnx", "expert_2.onnx", "expert_1.onnx", "expert_0.onnx", "decoder.onnx"]


def test_failed_load_reaches_the_job_and_may_be_tried_again(manifest: Manifest):
    rig = Rig(manifest)
    working, failing = rig.residency._open, [True]

    def open_graph(graph: Graph):
        if failing.pop() if failing else False:
            raise EngineError("broken")
        return working(graph)

    rig.residency._open = open_graph
    with pytest.raises(EngineError, match="broken"):
        rig.run(rig.job(16, 16))
    rig.run(rig.job(16, 16))


def test_non_finite_output_fails_one_job_and_names_the_graph(manifest: Manifest):
    def expert(row):
        return np.full_like(row["z_t"], np.nan) if row["cond"].max() == 0 else eps_of(row)

    rig = Rig(manifest, expert=expert)
    bad, good = rig.job(16, 16), rig.job(16, 16)
    assert isinstance(bad.phase, Sampling)
    bad.phase._cond[:] = 0
    rig.scheduler.submit(bad)
    rig.scheduler.submit(good)
    with pytest.raises(NonFiniteError, match=r"expert_3\.onnx: NaN or infinite .*fp16.*fp32"):
        rig.scheduler.run(bad, lambda: None)
    rig.scheduler.run(good, lambda: None)
    assert np.isfinite(good.image).all()


def test_cancelled_job_is_not_worked_on(manifest: Manifest):
    rig = Rig(manifest)
    dropped, kept = rig.job(16, 16), rig.job(16, 16)
    rig.scheduler.submit(dropped)
    rig.scheduler.submit(kept)
    rig.scheduler.cancel(dropped)
    rig.scheduler.run(kept, lambda: None)
    assert (dropped.units, kept.units) == (0, kept.total)


def test_threads_share_one_scheduler(manifest: Manifest):
    rig = Rig(manifest, max_batch=2)
    jobs = [rig.job(24, 24, seed=k) for k in range(6)]
    threads = [threading.Thread(target=rig.run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(job.done and job.error is None and job.units == job.total for job in jobs)
