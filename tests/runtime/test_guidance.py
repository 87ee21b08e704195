"""Classifier-free guidance: two predictions per tile, weighted s and 1 - s, on every device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import relative_l2
from engines import build_engine
from recording import RecordingDevice
from rigs import CudaRig, Rig, unit

from moesr.runtime import EngineError, Upscaler, UsageError
from moesr.runtime.cli.batch import describe
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest, write_manifest
from moesr.runtime.sampling import noise, samplers
from moesr.runtime.sampling.schedule import step_table

PROMPTS = ("good", "bad")
RNG = np.random.default_rng(4)


def eps_of(row: Mapping[str, np.ndarray]) -> np.ndarray:
    base = 0.9 * row["z_t"] + 0.1 * row["cond"] + np.float32(1e-4) * row["t"]
    return base + row["prompt"] * np.float32(0.2) * np.sin(row["z_t"])


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return read_manifest(build_engine(tmp_path / "engine", prompts=PROMPTS))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), prompts=PROMPTS, guidance=3.0)


def guided(rig: Rig, guidance: float, size: tuple[int, int] = (40, 23)):
    rng = np.random.default_rng(5)
    job = rig.job(*size, rng.integers(0, 256, (size[0] * 4, size[1] * 4, 3), np.uint8), guidance=guidance)
    job._condition = rng.integers(0, 256, (*size, 3), np.uint8)
    return job


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 7.0])
def test_guided_canvas_equals_the_plain_loop(manifest: Manifest, guidance: float):
    rig = Rig(manifest, max_batch=3, expert=eps_of)
    job = guided(rig, guidance)
    rig.run(job)
    cond, z = unit(job._condition), noise.gaussian(1, noise.INITIAL_NOISE, (3, 40, 23)).astype(np.float64)
    table = step_table(manifest.schedule, 4, 1.0, manifest.expert_ranges)
    for step in range(4):
        c = samplers.coefficients(table, step)
        wanted = 0.9 * z + 0.1 * cond + 1e-4 * table.t[step]
        unwanted = wanted + 0.2 * np.sin(z)
        eps = unwanted + guidance * (wanted - unwanted)
        z = c.c_z * z + c.c_out * eps + c.c_noise * noise.gaussian(1, step, z.shape)
    want = unit(job.lr) + 0.05 * z.repeat(4, axis=1).repeat(4, axis=2)
    assert relative_l2(job.image, want) < 1e-5


@pytest.mark.parametrize(("guidance", "prompts"), [(0.0, 1), (1.0, 1), (2.5, 2)])
def test_prompt_of_weight_zero_is_not_run(manifest: Manifest, guidance: float, prompts: int):
    rig = Rig(manifest, expert=eps_of)
    job = guided(rig, guidance)
    rig.run(job)
    assert job.ran == job.planned
    assert sum(count for role, count in job.ran.items() if role != "decoder") == 4 * 6 * prompts


def test_result_does_not_depend_on_batch_or_other_jobs(manifest: Manifest):
    alone, together = Rig(manifest, 1, expert=eps_of), Rig(manifest, 5, expert=eps_of)
    strengths = (7.0, 1.0, 0.0)
    single, shared = ([guided(rig, s) for s in strengths] for rig in (alone, together))
    for job in single:
        alone.run(job)
    together.run(*shared)
    for one, other in zip(single, shared, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


@pytest.mark.parametrize("max_batch", [1, 4])
def test_devices_agree(manifest: Manifest, tmp_path: Path, max_batch: int):
    host = Rig(manifest, max_batch, expert=eps_of)
    rigs = [
        Rig(manifest, max_batch, device=RecordingDevice(), expert=eps_of),
        CudaRig(manifest, tmp_path, max_batch, expert=eps_of),
    ]
    want = guided(host, 7.0)
    host.run(want)
    for rig in rigs:
        job = guided(rig, 7.0)
        rig.run(job)
        np.testing.assert_allclose(job.image, want.image, rtol=1e-5, atol=1e-5)


def test_default_strength_is_the_engines(engine: Path):
    lr = RNG.integers(0, 256, (16, 16, 3), np.uint8)
    with Upscaler(engine, device="cpu") as up:
        default, same, none = (up(lr, guidance=s, color_fix="none") for s in (None, 3.0, 1.0))
    np.testing.assert_array_equal(default, same)
    assert (default != none).any()


@pytest.mark.parametrize("value", [-0.5, 101, float("nan"), "7", True])
def test_bad_strengths_are_refused(engine: Path, value: object):
    with Upscaler(engine, device="cpu") as up, pytest.raises(UsageError, match=r"guidance is .*, expected a"):
        up.map([], guidance=value)  # type: ignore[arg-type]


def test_guidance_needs_a_negative_prompt(tmp_path: Path):
    with Upscaler(build_engine(tmp_path), device="cpu") as up:
        with pytest.raises(
            UsageError, match=r"guidance is 7, .*no negative prompt: .*moesr-export --guidance"
        ):
            up.map([], guidance=7.0)
        up.map([], guidance=1.0)


HARMS = {
    "strength without prompts": ({"prompts": (), "guidance": 7.0}, "7.0 without a negative prompt"),
    "strength": ({"guidance": -1.0}, "guidance is -1.0, expected a number from 0 to 100"),
    "three prompts": ({"prompts": ("a", "b", "c")}, "prompts has 3 entries"),
    "one prompt": ({"prompts": ("a",)}, "expert_0 is .*prompt.*, expected"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_manifests_that_cannot_guide_are_refused(manifest: Manifest, tmp_path: Path, harm: str):
    entries, message = HARMS[harm]
    with pytest.raises(EngineError, match=message):
        write_manifest(replace(manifest, **entries), tmp_path)


def test_experts_without_a_prompt_input_cannot_guide(tmp_path: Path):
    plain = read_manifest(build_engine(tmp_path))
    with pytest.raises(EngineError, match="expert_0 takes no prompt, though there are two"):
        write_manifest(replace(plain, prompts=PROMPTS), tmp_path)


def test_records_contain_the_strength_only_with_guidance(engine: Path, manifest: Manifest):
    options = {"steps": None, "guidance": None}
    assert describe(read_manifest(engine), options).settings["guidance"] == 3.0
    assert "guidance" not in describe(manifest, options).settings
    assert describe(manifest, options | {"guidance": 2.0}).settings["guidance"] == 2.0
