"""The GPU device over a simulated driver: results, order of work, CUDA graphs and use of memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_simulation import SimulatedDriver, lock_is_held, simulated_device, write_kernels
from engines import build_engine
from recording import FakeSession
from rigs import CudaRig, Rig, alike, eps_of

from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends.selection import Backend
from moesr.runtime.devices.capture_lock import capture_lock
from moesr.runtime.devices.compiled_kernels import KernelFiles, choose
from moesr.runtime.devices.cuda import AHEAD, MAX_FAILED_CAPTURES, CudaDevice
from moesr.runtime.devices.grid_expressions import evaluate
from moesr.runtime.devices.host import HostDevice
from moesr.runtime.devices.interface import Slot
from moesr.runtime.devices.loop_kernels import LoopKernels
from moesr.runtime.devices.staging import UPLOAD_BYTES, Staging
from moesr.runtime.engine.graph_spec import BATCH, TensorSpec
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError, NonFiniteError
from moesr.runtime.sampling import noise
from moesr.runtime.sampling.tiles import feather_weights, gaussian_weights

RNG = np.random.default_rng(11)
KERNELS = ("tile_gather", "tile_blend", "sampler_step")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return read_manifest(build_engine(tmp_path / "engine"))  # tiles of 16 latent pixels


@pytest.mark.parametrize("use_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("max_batch", [1, 4])
@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m"])
def test_loop_on_the_gpu_equals_the_host(manifest, tmp_path, max_batch, use_graphs, sampler):
    host = Rig(manifest, max_batch)
    wants = alike(host, sampler=sampler)
    host.run(*wants)
    rig = CudaRig(manifest, tmp_path, max_batch, use_graphs)
    jobs = alike(rig, sampler=sampler)
    rig.run(*jobs)
    for job, want in zip(jobs, wants, strict=True):
        np.testing.assert_allclose(job.image, want.image, rtol=1e-5, atol=1e-6)
    rig.worker.close()
    assert rig.driver.closed


def test_closing_after_an_error_of_the_gpu_releases_everything(tmp_path, monkeypatch):
    device, driver = simulated_device(tmp_path)
    canvas = device.canvas((3, 4, 4))
    device.gaussian(canvas, 0, 0)

    def fails() -> None:
        raise EngineError("an illegal memory access was encountered")

    monkeypatch.setattr(driver, "synchronize", fails)
    with pytest.raises(EngineError, match="illegal memory access"):
        device.close()
    assert driver.closed and not driver.shared and not device._weights


def test_latent_condition_and_start(tmp_path):
    """The engine has an encoder with noise, and sampling starts from the noised latent."""
    manifest = read_manifest(build_engine(tmp_path / "engine", encoder=True, init="latent"))
    host, rig = Rig(manifest, 2), CudaRig(manifest, tmp_path, 2)
    wants, jobs = alike(host, steps=3), alike(rig, steps=3)
    host.run(*wants)
    rig.run(*jobs)
    for job, want in zip(jobs, wants, strict=True):
        np.testing.assert_allclose(job.image, want.image, rtol=1e-5, atol=1e-6)


def test_no_read_or_wait_before_a_job_ends(manifest, tmp_path):
    rig = CudaRig(manifest, tmp_path, 4)
    rig.run(rig.job(40, 23, steps=5))
    log = rig.driver.log
    reads = [at for at, name in enumerate(log) if name in ("READ", "WAIT")]
    ran = [at for at, name in enumerate(log) if name == "replay" or name.startswith("run ")]
    assert len(ran) > 10 and min(reads) > max(ran)
    assert len(reads) == 3  # two flags and the image


def test_host_waits_when_it_is_too_far_ahead(manifest, tmp_path):
    rig = CudaRig(manifest, tmp_path)
    rig.run(rig.job(40, 40, steps=12))
    log = rig.driver.log
    sent = [at for at, name in enumerate(log) if name == "WAIT"]
    before = log[: sent[0]]
    ticks = before.count("replay") + sum(name.startswith("run ") for name in before)
    assert AHEAD // 2 < ticks <= AHEAD


@pytest.mark.parametrize("max_batch", [1, 4])
def test_graph_is_captured_once_per_number_of_slots(manifest, tmp_path, max_batch):
    rig = CudaRig(manifest, tmp_path, max_batch)
    for _ in range(3):
        rig.run(rig.job(40, 23, steps=8))  # 3 x 2 tiles
    log = rig.driver.log
    numbers = {role: {*s.batches} for role, s in rig.sessions.items()}
    assert log.count("capture") == sum(map(len, numbers.values()))
    eager = sum(name.startswith("run ") for name in log)
    assert eager == log.count("capture")  # the first run of each prepares the library
    calls = sum(len(session.batches) for session in rig.sessions.values())
    assert calls == 2 * log.count("capture")  # replays do not call the session


def test_eager_mode_launches_the_same_in_the_same_order(manifest, tmp_path):
    orders, images = [], []
    for use_graphs in (True, False):
        rig = CudaRig(manifest, tmp_path / str(use_graphs), 4, use_graphs)
        job = rig.job(40, 23, RNG.integers(0, 256, (160, 92, 3), np.uint8), steps=6)
        job._condition, job.lr = np.full((40, 23, 3), 90, np.uint8), np.full((160, 92, 3), 33, np.uint8)
        rig.run(job)
        orders.append(rig.driver.kernels)
        images.append(job.image)
        assert ("capture" in rig.driver.log) is use_graphs
    assert orders[0] == orders[1]
    np.testing.assert_array_equal(*images)


def test_tick_is_gather_graph_blend_and_step_is_one_launch(manifest, tmp_path):
    rig = CudaRig(manifest, tmp_path)
    rig.run(rig.job(16, 16, steps=4))
    expert = ["tile_gather", "tile_gather", "{}", "tile_blend", "sampler_step"]
    want = ["sampler_step"]  # the initial noise
    for k in (3, 2, 1, 0):
        want += [name.format(f"expert_{k}") for name in expert]
    want += ["tile_gather", "tile_gather", "decoder", "tile_blend"]
    assert rig.driver.kernels == want


def test_images_of_different_bit_depth_share_a_tick(tmp_path):
    device, driver = simulated_device(tmp_path)
    host = HostDevice()
    spec = TensorSpec("lr", "float32", (BATCH, 3, 6, 8))
    images = [RNG.integers(0, np.iinfo(d).max, (9, 11, 3), d) for d in (np.uint8, np.uint16, np.uint16)]

    def gathered(on: Any) -> Any:
        target, places = on.mean((3, 6, 6), [(0, 0)], gaussian_weights(6)), [(0, 0), (3, 2), (1, 3)]
        sources = [{"lr": on.upload(image)} for image in images]
        slots = [Slot(s, {}, target, y, x) for s, (y, x) in zip(sources, places, strict=True)]
        buffer = on.buffer(spec, 4)
        on.gather(slots, {"lr": buffer})
        return buffer

    want, buffer = gathered(host), gathered(device)
    got = np.empty((4, 3, 6, 8), np.float32)
    driver.copy_out(got, buffer.address)
    np.testing.assert_allclose(got[:3], want[:3], atol=1e-6)
    assert driver.kernels.count("tile_gather") == 2  # images of the same depth together
    assert not got[3].any()


def test_means_of_different_windows_share_a_call(tmp_path):
    device, driver = simulated_device(tmp_path)
    host, tile = HostDevice(), RNG.standard_normal((3, 2, 8, 8)).astype(np.float32)
    output = TensorSpec("eps", "float32", (BATCH, 2, 8, 8))

    def blended(on: Any) -> list[np.ndarray]:
        windows = (gaussian_weights(8), gaussian_weights(8), feather_weights(8, 4))
        means = [on.mean((2, 8, 12), [(0, 0), (0, 4)], window) for window in windows]
        slots = [Slot({}, {}, mean, 0, 4 * (i % 2)) for i, mean in enumerate(means)]
        buffer = on.buffer(output, 3)
        if on is host:
            buffer[:] = tile
        else:
            on._large.send_large(buffer.address, tile)
        on.blend(slots, buffer)
        return [on.download(mean) for mean in means]

    for got, want in zip(blended(device), blended(host), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    assert driver.kernels.count("tile_blend") == 2


@pytest.mark.parametrize("step", [noise.INITIAL_NOISE, 0, noise.ENCODING_NOISE])
def test_noise_follows_from_seed_and_step(tmp_path, step):
    device, _ = simulated_device(tmp_path)
    for size in [(3, 4, 5), (3, 9, 7), (2, 3, 4)]:
        canvas = device.canvas(size)
        device.gaussian(canvas, 2**64 - 1, step)
        np.testing.assert_array_equal(device.download(canvas), noise.gaussian(2**64 - 1, step, size))


def test_non_finite_values_fail_their_job_only(manifest, tmp_path):
    def poisoned(row: Mapping[str, np.ndarray]) -> np.ndarray:
        return eps_of(row) + np.where(row["cond"] == 1.0, np.nan, 0.0)

    rig = CudaRig(manifest, tmp_path, 4, expert=poisoned)
    jobs = [rig.job(16, 16) for _ in range(2)]
    jobs[0]._condition, jobs[1]._condition = (np.full((16, 16, 3), v, np.uint8) for v in (255, 80))
    for job in jobs:
        rig.worker.submit(job)
    with pytest.raises(NonFiniteError, match="expert"):
        rig.wait(jobs[0])
    rig.wait(jobs[1])
    assert np.isfinite(jobs[1].image).all()


def test_memory_of_jobs_is_reused_and_buffers_are_allocated_once(manifest, tmp_path):
    """The next job reuses the memory of a canceled job, whose last tick may still be outstanding."""
    rig = CudaRig(manifest, tmp_path, 2)
    rig.run(rig.job(40, 23))
    held = rig.driver._top
    for _ in range(3):
        job = rig.job(40, 23)
        rig.worker.submit(job)
        rig.worker.cancel(job)
        del job
        rig.run(rig.job(40, 23))
    rig.driver.synchronize()
    assert rig.driver._top <= 2 * held  # at most the canceled job and the next one


@pytest.mark.parametrize("how", ["begin", "within", "end"])
def test_failed_capture_runs_eagerly_and_is_retried(manifest, tmp_path, how):
    want, rig = CudaRig(manifest, tmp_path / "eager", 4, False), CudaRig(manifest, tmp_path / "graphs", 4)
    rig.driver.failing_captures.extend([how] * 2)
    images, lr = [], RNG.integers(0, 256, (160, 92, 3), np.uint8)
    for each in (want, rig):
        for _ in range(3):
            job = each.job(40, 23, lr, steps=8)
            job._condition = np.full((40, 23, 3), 90, np.uint8)
            each.run(job)
            images.append(job.image)
    for image in images:
        np.testing.assert_array_equal(image, images[0])
    assert rig.driver.log.count("failed capture") == 2
    assert rig.driver.log.count("capture") == sum(len({*s.batches}) for s in rig.sessions.values())
    assert rig.driver.kernels == want.driver.kernels  # a failed capture launches nothing twice


def test_no_capture_after_three_failures(manifest, tmp_path, caplog):
    rig = CudaRig(manifest, tmp_path)
    rig.driver.failing_captures.extend(["end"] * 100)
    for _ in range(2):
        rig.run(rig.job(16, 16, steps=20))
    decoder = 1  # it runs once per image, so its second run is the only attempt
    assert rig.driver.log.count("failed capture") == 4 * MAX_FAILED_CAPTURES + decoder
    assert "capture" not in rig.driver.log and "replay" not in rig.driver.log
    assert caplog.text.count("it is not tried again") == 4


def test_nothing_is_captured_while_a_graph_is_opened(manifest, tmp_path):
    rig = CudaRig(manifest, tmp_path)
    opening, opened = threading.Event(), threading.Event()

    def open_a_graph() -> None:
        with capture_lock:
            opening.set()
            opened.wait(60)

    thread = threading.Thread(target=open_a_graph, daemon=True)
    thread.start()
    assert opening.wait(60)
    rig.run(rig.job(16, 16, steps=20))  # does not wait for the other thread
    assert "capture" not in rig.driver.log
    opened.set()
    thread.join()
    rig.run(rig.job(16, 16, steps=20))
    assert rig.driver.log.count("capture") == 5


def test_graphs_of_a_gpu_are_opened_under_the_lock(tmp_path, monkeypatch):
    held = []

    monkeypatch.setattr("moesr.runtime.backends.ort.open_session", lambda *_: held.append(lock_is_held()))
    graph = read_manifest(build_engine(tmp_path)).graphs["decoder"]
    for device in ("cuda", "cpu"):
        Backend("onnxruntime", SessionOptions(device), 1).open(tmp_path, graph)
    assert held == [True, False]


def test_interrupted_capture_is_abandoned(tmp_path):
    device, driver = simulated_device(tmp_path)

    def interrupted() -> None:
        if driver._captured is not None:
            raise KeyboardInterrupt

    session = FakeSession.__new__(FakeSession)
    device._replay(session, "key", interrupted)
    with pytest.raises(KeyboardInterrupt):
        device._replay(session, "key", interrupted)
    assert driver._captured is None
    assert not lock_is_held()


def test_session_error_is_the_error_of_its_tick(manifest, tmp_path):
    rig = CudaRig(manifest, tmp_path)
    rig.run(rig.job(16, 16, steps=4))  # each graph has run once
    expert = rig.sessions["expert_3"]
    works, expert.enqueue = expert.enqueue, lambda batch: (_ for _ in ()).throw(EngineError("no run"))
    with pytest.raises(EngineError, match="no run"):
        rig.run(rig.job(16, 16, steps=4))
    expert.enqueue = works
    rig.run(rig.job(16, 16, steps=4))


def test_sessions_that_cannot_be_captured_run_eagerly(manifest, tmp_path):
    rig = CudaRig(manifest, tmp_path)
    opened = rig.residency._open
    rig.residency._open = lambda role: setattr(session := opened(role), "capturable", False) or session
    rig.run(rig.job(16, 16, steps=6))
    assert "capture" not in rig.driver.log


@pytest.mark.parametrize("op", KERNELS)
def test_missing_kernel_is_refused_at_once(tmp_path, op):
    driver = SimulatedDriver()
    files = KernelFiles(write_kernels(tmp_path, without=op), driver)
    with pytest.raises(EngineError, match=f"no fp32 kernel of {op}.*kernels.build --arch sm_90"):
        CudaDevice(driver, files)


def test_kernels_for_other_gpus_are_refused(tmp_path):
    write_kernels(tmp_path, ["sm_80", "sm_86"])
    with pytest.raises(
        EngineError, match=r"compiled for sm_80, sm_86, but Simulated GPU is sm_90; .*--arch sm_90"
    ):
        KernelFiles(tmp_path, SimulatedDriver(90))
    assert KernelFiles(tmp_path, SimulatedDriver(87)).architecture == "sm_86"


def test_damaged_kernels_are_refused(tmp_path):
    with pytest.raises(EngineError, match="there are no kernels"):
        KernelFiles(tmp_path, SimulatedDriver())
    write_kernels(tmp_path)
    for file in (tmp_path / "sm_90").iterdir():
        file.write_bytes(b"{}  ")
    driver = SimulatedDriver()
    device = CudaDevice(driver, KernelFiles(tmp_path, driver))
    with pytest.raises(EngineError, match="does not match its recorded hash"):
        device.gaussian(device.canvas((3, 4, 4)), 0, 0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [({"schema": 7}, "schema 7, expected 3"), ({"kernels": 3}, "kernels is 3, expected an object")],
    ids=["schema", "content"],
)
def test_unsupported_kernels_json_is_refused(tmp_path, entries, message):
    path = write_kernels(tmp_path) / "kernels.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(EngineError, match=f"{message}; make them with"):
        KernelFiles(tmp_path, SimulatedDriver())


def test_scratch_memory_of_kernels_is_refused(tmp_path):
    path = write_kernels(tmp_path) / "kernels.json"
    path.write_text(path.read_text().replace('"profile_scratch": 0', '"profile_scratch": 64', 1))
    with pytest.raises(EngineError, match="profile_scratch is 64, expected 0, since scratch memory"):
        KernelFiles(tmp_path, SimulatedDriver())


def test_users_of_a_driver_share_kernels_and_staging(tmp_path):
    driver = SimulatedDriver()
    write_kernels(tmp_path)
    assert KernelFiles.of(tmp_path, driver) is KernelFiles.of(tmp_path / "sm_90" / "..", driver)
    assert Staging.of(driver) is Staging.of(driver)
    assert driver.peak_pinned == UPLOAD_BYTES
    assert KernelFiles.of(tmp_path, driver) is not KernelFiles.of(tmp_path, SimulatedDriver())
    driver.close()
    assert not driver.shared


@pytest.mark.parametrize(("slots", "channels"), [(65_536, 1), (1, 65_536), (0, 1)])
def test_grids_beyond_the_limits_of_a_gpu_are_refused(tmp_path, slots, channels):
    loop = LoopKernels(KernelFiles(write_kernels(tmp_path), SimulatedDriver()))
    with pytest.raises(EngineError, match=f"{channels} x {slots} blocks, .* lower max_batch"):
        loop.gather(0, 0, 0, slots, (channels, 8, 8), 4)


def test_staged_values_arrive_with_any_size_of_ring(tmp_path):
    driver = SimulatedDriver()
    arrays = [RNG.integers(0, 256, int(n), np.uint8) for n in RNG.integers(1, 200, 40)]
    blocks = [driver.alloc(a.nbytes) for a in arrays]
    staging = Staging(driver, 256)
    for array, block in zip(arrays, blocks, strict=True):
        sent = array.copy()
        staging.send([(block.address, sent)])
        sent[:] = 0
    large = RNG.standard_normal(1000).astype(np.float32)
    whole = driver.alloc(large.nbytes)
    staging.send_large(whole.address, large)
    got = np.empty_like(large)
    driver.copy_out(got, whole.address)
    np.testing.assert_array_equal(got, large)
    for array, block in zip(arrays, blocks, strict=True):
        np.testing.assert_array_equal(driver.view(block.address, array.nbytes), array)
    with pytest.raises(ValueError, match="272 bytes cannot be sent at once through a ring of 256"):
        staging.send([(whole.address, np.zeros(257, np.uint8))])


@pytest.mark.parametrize(
    ("expression", "want"), [("cdiv(height, 8) * cdiv(w, 64)", 6), ("max(3, w // 2) - 1", 34), (7, 7)]
)
def test_expressions(expression, want):
    assert evaluate(expression, {"height": 17, "w": 70}) == want


@pytest.mark.parametrize(
    "expression",
    [
        *("other", "w ** 2", "__import__('os')", "w.real", "1.5"),
        *("w //", "w // 0", "cdiv(w, 0)", "w = 1", "(" * 190, "1" * 199, -4.5),
    ],
)
def test_invalid_expressions_are_refused(expression):
    with pytest.raises(ValueError, match=r"cannot evaluate|too large"):
        evaluate(expression, {"w": 70})


@pytest.mark.parametrize(
    ("targets", "capability", "want"),
    [
        (("sm_80", "sm_86", "sm_89", "ptx"), 89, "sm_89"),
        (("sm_80", "sm_90"), 87, "sm_80"),
        (("sm_80", "sm_90", "ptx"), 103, "ptx"),
        (("sm_80", "ptx"), 75, None),
        (("sm_90",), 89, None),
        (("sm_100", "sm_120"), 121, None),
        (("sm_100", "sm_120", "ptx"), 121, "ptx"),
        (("sm_100", "sm_103", "ptx"), 103, "sm_103"),
    ],
)
def test_choice_of_an_architecture(targets, capability, want):
    assert choose(targets, capability) == want
