"""Jobs and ticks: sampling on a canvas, order, sharing of ticks, residency, failures, devices."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import relative_l2
from engines import build_engine
from recording import RecordingDevice
from rigs import RNG, Rig, Row, eps_of, image_of, unit

from moesr.runtime.devices.host import HostDevice
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError, NonFiniteError, UsageError
from moesr.runtime.loop.cost_model import Costs
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.sampling import noise, samplers
from moesr.runtime.sampling.schedule import step_table


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return read_manifest(build_engine(tmp_path / "engine"))  # 16 latent pixels per tile


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("size", [(16, 16), (16, 17), (40, 23)], ids=str)
def test_canvas_equals_the_plain_loop(manifest: Manifest, size: tuple[int, int], sampler: str):
    rig = Rig(manifest)
    job = rig.job(*size, sampler=sampler, steps=7)
    rig.run(job)

    cond, z = unit(job._condition), noise.gaussian(1, noise.INITIAL_NOISE, (3, *size)).astype(np.float64)
    history = 0.0
    table = samplers.SAMPLERS[sampler].table(manifest.schedule, 7, manifest.expert_ranges)
    for step in range(7):
        c = samplers.coefficients(table, step)
        eps = 0.9 * z + 0.1 * cond + 1e-4 * table.t[step]
        x0 = (z - np.sqrt(1 - table.alpha_bar[step]) * eps) / np.sqrt(table.alpha_bar[step])
        z = c.c_z * z + c.c_out * eps + c.c_noise * noise.gaussian(1, step, z.shape) + c.c_history * history
        history = x0
    want = unit(job.lr) + 0.05 * z.repeat(4, axis=1).repeat(4, axis=2)
    assert relative_l2(job.image, want) < 1e-5


@pytest.mark.parametrize("size", [(16, 16), (40, 23)], ids=str)
def test_latent_condition_and_start(tmp_path: Path, size: tuple[int, int]):
    """The encoder's latent conditions every step, and sampling starts from this latent with noise."""
    manifest = read_manifest(build_engine(tmp_path, encoder=True, init="latent", prediction="eps"))
    rig = Rig(manifest, max_batch=2)
    job = rig.job(*size, steps=3)
    rig.run(job)
    assert list(job.planned) == ["encoder", "expert_2", "expert_1", "expert_0", "decoder"]
    assert job.ran == job.planned

    shape = (3, *size)
    cond = unit(job.lr)[:, ::4, ::4] + 0.1 * noise.gaussian(1, noise.ENCODING_NOISE, shape)
    share = manifest.schedule.alpha_bar[-1]
    z = np.sqrt(share) * cond + np.sqrt(1 - share) * noise.gaussian(1, noise.INITIAL_NOISE, shape)
    table = step_table(manifest.schedule, 3, 1.0, manifest.expert_ranges)
    for step in range(3):
        c = samplers.coefficients(table, step)
        eps = 0.9 * z + 0.1 * cond + 1e-4 * table.t[step]
        z = c.c_z * z + c.c_out * eps + c.c_noise * noise.gaussian(1, step, z.shape)
    want = unit(job.lr) + 0.05 * z.repeat(4, axis=1).repeat(4, axis=2)
    assert relative_l2(job.image, want) < 1e-5


def test_latents_that_are_images_need_no_decoder(tmp_path: Path, manifest: Manifest):
    graphs = {role: graph for role, graph in manifest.graphs.items() if role != "decoder"}
    with pytest.raises(EngineError, match="without a decoder, latents must be images"):
        build_engine(tmp_path / "refused", graphs=graphs)
    side = {"tile": 16, "latent_factor": 1}
    rig = Rig(read_manifest(build_engine(tmp_path / "pixels", graphs=graphs, **side), verify=False))
    job = rig.job(20, 16, lr=RNG.integers(0, 256, (20, 16, 3), np.uint8))
    rig.run(job)
    assert job.image.shape == (3, 20, 16)
    assert "decoder" not in job.ran


def test_result_does_not_depend_on_batch_or_other_jobs(manifest: Manifest):
    alone, together = Rig(manifest, 1), Rig(manifest, 3)
    state = RNG.bit_generator.state
    options = {"sampler": "dpm++2m", "steps": 6}, {"seed": 2}, {"fidelity": 0.5, "sampler": "dpm++2m"}
    sizes = (20, 40), (16, 16), (33, 16)
    single = [alone.job(*size, **given) for size, given in zip(sizes, options, strict=True)]
    RNG.bit_generator.state = state
    shared = [together.job(*size, **given) for size, given in zip(sizes, options, strict=True)]
    for job in single:
        alone.run(job)
    together.run(*shared)
    for one, other in zip(single, shared, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m"])
def test_nothing_is_read_back_between_ticks(manifest: Manifest, max_batch: int, sampler: str):
    """The whole loop runs on a device that has done no work yet when the host continues."""
    state = RNG.bit_generator.state
    host = Rig(manifest, max_batch)
    jobs = [host.job(20, 40, sampler=sampler), host.job(16, 16, seed=2, sampler=sampler)]
    host.run(*jobs)
    RNG.bit_generator.state = state
    rig = Rig(manifest, max_batch, device=RecordingDevice())
    behind = [rig.job(20, 40, sampler=sampler), rig.job(16, 16, seed=2, sampler=sampler)]
    rig.run(*behind)
    for one, other in zip(jobs, behind, strict=True):
        np.testing.assert_array_equal(one.image, other.image)

    log = rig.device.log
    reads = [at for at, entry in enumerate(log) if entry.startswith("READ")]
    assert [log[at] for at in reads] == 2 * ["READ finite", "READ finite", "READ download"]
    for at in reads[::3]:  # the reads of an image follow its last tick
        assert log[at - 2] == "run decoder.onnx"
    ticks = [at for at, entry in enumerate(log) if entry.startswith("gather")]
    for at in ticks:  # every tick consists of gather, graph and blend
        slots = log[at].removeprefix("gather ")
        assert log[at + 1].startswith("run ")
        assert log[at + 2] == f"blend {slots}"
    assert sum(entry == "advance" for entry in log) == 2 * 4
    assert sum(entry.startswith("buffer") for entry in log) == 4 + 4  # for experts and for the decoder


def test_costs_are_measured_on_an_asynchronous_device(manifest: Manifest):
    rig = Rig(manifest, 2, device=RecordingDevice(), expert=lambda row: time.sleep(0.01) or eps_of(row))
    start = time.perf_counter()
    rig.run(rig.job(24, 24, steps=4))
    passed = time.perf_counter() - start
    ran = {role: sum(session.batches) for role, session in rig.sessions.items()}
    assert 0.01 * 16 < rig.costs.seconds(ran) <= passed
    assert not rig.worker._unmeasured


def test_asynchronous_device_reports_nan_at_the_end(manifest: Manifest):
    def expert(row: Row) -> np.ndarray:
        return np.full_like(row["z_t"], np.nan) if row["cond"].max() == -1 else eps_of(row)

    rig = Rig(manifest, 2, device=RecordingDevice(), expert=expert)
    bad, good = rig.job(16, 16), rig.job(16, 16)
    bad._condition[:] = 0
    rig.worker.submit(bad)
    rig.worker.submit(good)
    with pytest.raises(NonFiniteError, match="expert_"):
        rig.wait(bad)
    rig.wait(good)
    assert np.isfinite(good.image).all()


def test_batches_are_filled_from_several_jobs(manifest: Manifest):
    rig = Rig(manifest, max_batch=4)
    jobs = [rig.job(16, 16, seed=k, fidelity=k / 4) for k in range(4)]
    with rig.worker.lock:  # nothing runs before all jobs are in flight
        for job in jobs:
            rig.worker.submit(job)
    for job in jobs:
        rig.wait(job)
    assert all(session.batches == [4] for session in rig.sessions.values())


def test_different_fidelities_are_not_mixed_if_a_run_has_one_value(tmp_path: Path):
    """Graphs of schema 1 take one fidelity for all tiles of a run."""
    manifest = read_manifest(build_engine(tmp_path))
    decoder = manifest.graphs["decoder"]
    inputs = tuple(replace(i, dims=(1,)) if i.name == "fidelity" else i for i in decoder.inputs)
    manifest = replace(manifest, graphs=manifest.graphs | {"decoder": replace(decoder, inputs=inputs)})
    rig = Rig(manifest, max_batch=4)
    rig.run(rig.job(16, 16, fidelity=0.0), rig.job(16, 16, fidelity=1.0))
    assert rig.sessions["decoder"].batches == [1, 1]


def test_all_planned_tiles_run(manifest: Manifest):
    rig = Rig(manifest)
    job = rig.job(40, 23, steps=6)
    rig.run(job)
    assert job.ran == job.planned == {role: sum(s.batches) for role, s in rig.sessions.items()}
    assert len(TileLayout(manifest, 40, 23).sampling) == 6


def test_only_used_experts_are_loaded(manifest: Manifest):
    rig = Rig(manifest)
    rig.run(rig.job(16, 16, steps=1))
    assert set(rig.opened) == {"expert_0", "decoder"}


@pytest.mark.parametrize(("keep_all", "most"), [(True, 5), (False, 2)], ids=["resident", "rotating"])
def test_residency(manifest: Manifest, keep_all: bool, most: int):
    rig = Rig(manifest, keep_all=keep_all)
    loaded: list[int] = []
    session = rig.worker._session

    def spy(role: str, upcoming: str | None):
        found = session(role, upcoming)
        loaded.append(len(rig.residency.loaded))
        return found

    rig.worker._session = spy
    rig.run(rig.job(16, 16))
    assert max(loaded) == most
    assert rig.opened == ["expert_3", "expert_2", "expert_1", "expert_0", "decoder"]
    assert [s.closed for s in rig.sessions.values()] == [not keep_all] * 3 + [not keep_all, False]
    rig.worker.close()
    assert all(s.closed for s in rig.sessions.values())


def test_failed_load_fails_the_job_and_can_be_retried(manifest: Manifest):
    rig = Rig(manifest)
    working, failing = rig.residency._open, [True]

    def open_graph(role: str):
        if failing.pop() if failing else False:
            raise EngineError("broken")
        return working(role)

    rig.residency._open = open_graph
    with pytest.raises(EngineError, match="broken"):
        rig.run(rig.job(16, 16))
    rig.run(rig.job(16, 16))


@pytest.mark.parametrize("keep_all", [True, False])
def test_graph_that_cannot_be_loaded_ahead_is_loaded_when_needed(manifest: Manifest, keep_all: bool):
    """If memory is short, the next graph fits only after the previous one is released."""
    rig = Rig(manifest, keep_all=keep_all)
    working, failed = rig.residency._open, []

    def open_graph(role: str):
        if role == "expert_2" and not failed:
            failed.append(role)
            raise MemoryError
        return working(role)

    rig.residency._open = open_graph
    job = rig.job(16, 16)
    rig.run(job)
    assert failed and job.error is None


def poisoned(row: Row) -> np.ndarray:
    return np.full_like(row["z_t"], np.nan) if row["cond"].max() == -1 else eps_of(row)


@pytest.mark.parametrize("max_batch", [1, 2, 4])
def test_non_finite_output_fails_one_job_and_names_the_graph(tmp_path: Path, max_batch: int):
    manifest = read_manifest(build_engine(tmp_path, precision="fp16"))
    rig = Rig(manifest, max_batch, expert=poisoned)
    bad, good = rig.job(16, 16), rig.job(16, 16)
    bad._condition[:] = 0
    rig.worker.submit(bad)
    rig.worker.submit(good)
    with pytest.raises(NonFiniteError, match=r"expert_3\.onnx: NaN or infinite .*fp16.*float32"):
        rig.wait(bad)
    rig.wait(good)
    assert np.isfinite(good.image).all()


def test_out_of_memory_fails_only_its_image(manifest: Manifest):
    """The memory for pixels is allocated when decoding begins."""

    class Small(HostDevice):
        def mean(self, shape: tuple[int, int, int], *arguments: Any, **more: Any) -> Any:
            if shape[1] > 100:
                raise MemoryError
            return super().mean(shape, *arguments, **more)

    rig = Rig(manifest, max_batch=4, device=Small())
    large, small = rig.job(32, 32), rig.job(16, 16)
    rig.worker.submit(large)
    rig.worker.submit(small)
    with pytest.raises(MemoryError):
        rig.wait(large)
    rig.wait(small)


def test_internal_error_fails_only_the_images_concerned(manifest: Manifest):
    def decoder(row: Row) -> np.ndarray:
        if row["fidelity"] == 0:
            raise ZeroDivisionError("a defect")
        return image_of(row)

    rig = Rig(manifest, decoder=decoder)
    bad, good = rig.job(16, 16, fidelity=0.0), rig.job(16, 16)
    rig.worker.submit(bad)
    rig.worker.submit(good)
    rig.wait(good)
    with pytest.raises(ZeroDivisionError):
        rig.wait(bad)


def test_submitting_and_canceling_do_not_wait_for_a_graph(manifest: Manifest):
    started, go_on = threading.Event(), threading.Event()

    def expert(row: Row) -> np.ndarray:
        started.set()
        assert go_on.wait(60)
        return eps_of(row)

    rig = Rig(manifest, expert=expert)
    running, dropped, kept = rig.job(16, 16), rig.job(16, 16), rig.job(16, 16)
    rig.worker.submit(running)
    assert started.wait(60)
    rig.worker.submit(dropped)  # while the graph runs
    rig.worker.cancel(dropped)
    rig.worker.submit(kept)
    rig.worker.cancel(running)
    go_on.set()
    rig.wait(kept)
    assert dropped.ran.total() == 0
    assert running.ran.total() <= 1
    for job in (dropped, running):
        with pytest.raises(CancelledError):
            rig.wait(job)


def test_closing_ends_jobs_in_flight(manifest: Manifest):
    started = threading.Event()
    rig = Rig(manifest, expert=lambda row: started.set() or eps_of(row))
    job = rig.job(16, 16, steps=1000)
    rig.worker.submit(job)
    assert started.wait(60)
    rig.worker.close()
    with pytest.raises(UsageError, match="closed"):
        rig.wait(job)
    with pytest.raises(UsageError, match="closed"):
        rig.worker.submit(rig.job(16, 16))


def test_threads_share_one_worker(manifest: Manifest):
    rig = Rig(manifest, max_batch=2)
    jobs = [rig.job(24, 24, seed=k) for k in range(6)]
    threads = [threading.Thread(target=rig.run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(job.done and job.error is None and job.ran == job.planned for job in jobs)


def test_costs_start_from_macs_and_follow_measurements(manifest: Manifest):
    decoder = replace(manifest.graphs["decoder"], macs=10_000)
    costs = Costs(manifest.graphs | {"decoder": decoder})
    work = {"expert_0": 20, "decoder": 1}
    assert costs.seconds({"decoder": 1}) == pytest.approx(10 * costs.seconds({"expert_0": 1}))
    costs.observe("expert_3", 4, 2.0)  # half a second per tile
    assert costs.seconds({"expert_3": 1}) == pytest.approx(0.5)
    assert costs.seconds(work) == pytest.approx(20 * 0.5 + 5.0)
    costs.observe("decoder", 2, 30.0)
    assert costs.seconds({"decoder": 1}) == pytest.approx(15.0)


@pytest.mark.parametrize("macs", [-1, 10**19, 10**400], ids=["negative", "20 digits", "400 digits"])
def test_impossible_numbers_of_macs_are_refused(manifest: Manifest, macs: int):
    harmed = {"decoder": replace(manifest.graphs["decoder"], macs=macs)}
    with pytest.raises(EngineError, match=r"graph 'decoder': .* \(macs\) outside 0 to 1e18; export"):
        Costs(manifest.graphs | harmed)
