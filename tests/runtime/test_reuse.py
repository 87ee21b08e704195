"""Deep features that are reused between steps: which graph runs when, which features are kept, and errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import relative_l2
from cuda_simulation import SimulatedDriver
from engines import build_engine
from PIL import Image
from recording import RecordingDevice
from rigs import CudaRig, Rig, alike, unit

from moesr.runtime import Upscaler
from moesr.runtime.cli import doctor
from moesr.runtime.cli.run import main
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError, UsageError
from moesr.runtime.images import provenance
from moesr.runtime.loop.admission import Admission, feature_bytes
from moesr.runtime.loop.graph_memory import GraphMemory
from moesr.runtime.loop.residency import Residency
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.sampling import noise, samplers
from moesr.runtime.sampling.schedule import full_steps

RNG = np.random.default_rng(12)
Row = Mapping[str, np.ndarray]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return read_manifest(build_engine(tmp_path / "engine", reuse=True))  # 16 latent pixels per tile


def full_of(k: int) -> Any:
    def full(row: Row) -> tuple[np.ndarray, np.ndarray]:
        eps = 0.9 * row["z_t"] + 0.1 * row["cond"] + np.float32(1e-4) * row["t"] + np.float32(0.01 * k)
        return eps, np.concatenate([eps, eps - 1])

    return full


def shallow_of(k: int) -> Any:
    return lambda row: 0.5 * row["deep"][3:] + 0.4 * row["z_t"] + np.float32(0.01 * k)


FUNCTIONS = {f"expert_{k}": full_of(k) for k in range(4)} | {f"shallow_{k}": shallow_of(k) for k in range(4)}


def test_each_expert_begins_with_a_full_step():
    experts = np.array([3, 3, 3, 3, 2, 1, 1, 1, 0, 0])
    for interval, want in ((1, "1111111111"), (2, "1010110110"), (3, "1001110010"), (9, "1000110010")):
        assert full_steps(experts, interval).tolist() == [c == "1" for c in want], interval
    assert full_steps(experts[:1], 4).tolist() == [True]


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m"])
@pytest.mark.parametrize("size", [(16, 16), (40, 23)], ids=str)
def test_canvas_equals_the_plain_loop(manifest: Manifest, size: tuple[int, int], sampler: str):
    rig = Rig(manifest, max_batch=2, **FUNCTIONS)
    job = rig.job(*size, sampler=sampler, steps=12, reuse=2)
    rig.run(job)
    assert job._condition is not None
    table = samplers.SAMPLERS[sampler].table(manifest.schedule, 12, manifest.expert_ranges)
    cond, z = unit(job._condition), noise.gaussian(1, noise.INITIAL_NOISE, (3, *size)).astype(np.float64)
    history, deep, full = np.zeros(z.shape), np.zeros(z.shape), full_steps(table.expert, 2)
    for step, k in enumerate(table.expert):
        eps = 0.9 * z + 0.1 * cond + 1e-4 * table.t[step] + 0.01 * k
        if full[step]:
            deep = eps - 1
        else:
            eps = 0.5 * deep + 0.4 * z + 0.01 * k
        c = samplers.coefficients(table, step)
        x0 = c.x_z * z + c.x_out * eps
        z = c.c_z * z + c.c_out * eps + c.c_noise * noise.gaussian(1, step, z.shape) + c.c_history * history
        history = x0
    want = unit(job.lr) + 0.05 * z.repeat(4, axis=1).repeat(4, axis=2)
    assert job.image is not None and relative_l2(job.image, want) < 1e-5
    assert job.ran == job.planned == {role: sum(s.batches) for role, s in rig.sessions.items()}
    assert 0 < job.planned["shallow_3"] < job.planned["expert_3"] * 2


def test_full_steps_run_no_shallow_graph(manifest: Manifest):
    rig = Rig(manifest, **FUNCTIONS)
    rig.run(rig.job(16, 16, steps=8, reuse=1))
    assert not any(role.startswith("shallow") for role in rig.opened)


def test_result_does_not_depend_on_batch_or_other_jobs(manifest: Manifest):
    """Each image has its own interval, so that full and shallow steps of several images meet."""
    sizes, options = ((20, 40), (16, 16), (33, 16)), ({"reuse": 3}, {"reuse": 1}, {"reuse": 2, "steps": 9})
    images = []
    for max_batch in (1, 3):
        rig, rng = Rig(manifest, max_batch, **FUNCTIONS), np.random.default_rng(4)
        jobs = []
        for size, given in zip(sizes, options, strict=True):
            lr = rng.integers(0, 256, (size[0] * 4, size[1] * 4, 3), np.uint8)
            job = rig.job(*size, lr, **({"steps": 12} | given))
            job._condition = lr[::4, ::4].copy()
            jobs.append(job)
        if max_batch == 1:
            for job in jobs:
                rig.run(job)
        else:
            rig.run(*jobs)
        images.append([job.image for job in jobs])
    for one, other in zip(*images, strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_readback_and_features_are_kept_after_full_steps(manifest: Manifest):
    images = []
    behind = RecordingDevice()
    for device in (None, behind):
        rig = Rig(manifest, 3, device=device, **FUNCTIONS)
        lr = np.random.default_rng(6).integers(0, 256, (80, 160, 3), np.uint8)
        job = rig.job(20, 40, lr, steps=8, reuse=2)
        job._condition = lr[::4, ::4].copy()
        rig.run(job)
        images.append(job.image)
    np.testing.assert_array_equal(*images)
    log = behind.log
    reads = [at for at, entry in enumerate(log) if entry.startswith("READ")]
    assert reads == list(range(len(log) - 3, len(log)))
    for at, entry in enumerate(log):
        if entry.startswith("keep"):
            assert log[at - 1].startswith("blend") and log[at - 2].startswith("run expert")


@pytest.mark.parametrize("use_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("max_batch", [1, 4])
def test_gpu_equals_the_host(manifest: Manifest, tmp_path: Path, max_batch: int, use_graphs: bool):
    host = Rig(manifest, max_batch, **FUNCTIONS)
    wants = alike(host, steps=9, reuse=3)
    host.run(*wants)
    rig = CudaRig(manifest, tmp_path, max_batch, use_graphs, **FUNCTIONS)
    jobs = alike(rig, steps=9, reuse=3)
    rig.run(*jobs)
    for job, want in zip(jobs, wants, strict=True):
        np.testing.assert_allclose(job.image, want.image, rtol=1e-5, atol=1e-6)
    assert isinstance(rig.driver, SimulatedDriver) and "copy" in rig.driver.log
    rig.worker.close()


def test_both_graphs_of_an_expert_stay_loaded_if_memory_is_short(manifest: Manifest):
    rig = Rig(manifest, keep_all=False, **FUNCTIONS)
    rig.run(rig.job(16, 16, steps=12, reuse=2))
    order = [f"{kind}_{k}" for k in (3, 2, 1, 0) for kind in ("expert", "shallow")]
    assert rig.opened == [*order, "decoder"]  # each is opened once, though they alternate


@pytest.mark.parametrize(("reuse", "guidance", "copies"), [(1, 1.0, 0), (2, 1.0, 1), (2, 4.0, 2)])
def test_memory_of_the_features(manifest: Manifest, reuse: int, guidance: float, copies: int):
    settings, layout = Settings(4, "ddpm", 1, 1.0, guidance, reuse), TileLayout(manifest, 40, 23)
    tiles = len(layout.sampling)
    assert feature_bytes(layout, settings) == copies * tiles * 6 * 16 * 16 * 4


def test_reservation_includes_the_features(manifest: Manifest, tmp_path: Path):
    graphs = GraphMemory(manifest, tmp_path / "engine", "cpu", 1)
    admission, layout = Admission(graphs, Residency(lambda role: None, True)), TileLayout(manifest, 40, 23)  # type: ignore[arg-type]
    plain, reused = (admission.reserve(layout, Settings(4, "ddpm", 1, 1.0, 1.0, n)) for n in (1, 2))
    assert plain and reused and reused.counts[0] > plain.counts[0]


def test_end_to_end_on_files(tmp_path: Path):
    """ONNX Runtime runs both graphs, and the features go through their buffers."""
    engine = build_engine(tmp_path / "engine", reuse=True, steps=12)
    lr = RNG.integers(0, 256, (20, 31, 3), np.uint8)
    with Upscaler(engine, backend="onnxruntime") as up:
        full, two, again = up(lr), up(lr, reuse=2), up(lr, reuse=2)
        np.testing.assert_array_equal(two, again)
        assert np.any(full != two)
        refused: tuple[Any, ...] = (0, 101, 1.5, True)
        for reuse in refused:
            with pytest.raises(UsageError, match=f"reuse is {reuse}, expected a whole number from 1 to 100"):
                up(lr, reuse=reuse)


def test_engine_without_shallow_graphs_is_refused(tmp_path: Path):
    with Upscaler(build_engine(tmp_path), backend="onnxruntime") as up:
        up(np.zeros((8, 8, 3), np.uint8), steps=1, reuse=1)
        with pytest.raises(UsageError, match=r"reuse is 2, but synthetic has no shallow graphs.*--reuse"):
            up(np.zeros((8, 8, 3), np.uint8), reuse=2)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    engine = build_engine(tmp_path / "engine", reuse=True)
    Image.fromarray(RNG.integers(0, 256, (9, 12, 3), np.uint8)).save(tmp_path / "a.png")
    call = [str(tmp_path / "a.png"), "--engine", str(engine), "--backend", "onnxruntime", "--quiet"]
    assert main([*call, "-o", str(tmp_path / "one.png")]) == 0
    assert main([*call, "-o", str(tmp_path / "two.png"), "--reuse", "2", "--steps", "9"]) == 0
    one, two = (provenance.read(tmp_path / name) for name in ("one.png", "two.png"))
    assert one and two and "reuse" not in one.settings and two.settings["reuse"] == 2
    assert main([*call, "--reuse", "0"]) == 2
    assert "reuse is 0, expected a whole number from 1 to 100" in capsys.readouterr().err


MISUSE = {
    "no shallow graph": (lambda v: v["graphs"].pop("shallow_2"), "no graph 'shallow_2'"),
    "shallow graphs of some experts": (
        lambda v: v["experts"][1].update(shallow=None),
        "some experts have a shallow graph and some have none",
    ),
    "experts without features": (
        lambda v: v["graphs"]["expert_0"]["outputs"].pop(),
        "expert_0 has a shallow graph and no output 'deep'",
    ),
    "features without a size": (
        lambda v: v["graphs"]["expert_0"]["outputs"][1]["dims"].pop(),
        "expert_0 has a shallow graph and no output 'deep'",
    ),
    "features of several sizes": (
        lambda v: v["graphs"]["expert_1"]["outputs"][1].update(dims=["B", 5, 16, 16]),
        "experts differ in their output 'deep'",
    ),
    "features that are not taken": (
        lambda v: v["graphs"]["shallow_3"]["inputs"].pop(),
        r"shallow_3 is z_t .*16\] -> eps .*expected z_t .*deep float32 \[B, 6, 16, 16\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISUSE.values(), ids=MISUSE)
def test_inconsistent_manifests_are_refused(tmp_path: Path, change: Any, message: str):
    path = build_engine(tmp_path, reuse=True) / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(EngineError, match=message):
        read_manifest(tmp_path)


def test_doctor_reports_the_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    engine = build_engine(tmp_path, reuse=True)
    assert doctor.main(["--engine", str(engine), "--backend", "onnxruntime"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("reuse"))
    assert "with --reuse N, 6 kB of features kept per tile" in line
