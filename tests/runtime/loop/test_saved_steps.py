"""Steps that are saved, and images that go on after them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import build_engine
from PIL import Image
from rigs import CudaRig, Rig, eps_of

from moesr.runtime import Upscaler
from moesr.runtime.cli.run import main
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError
from moesr.runtime.images import reading, writing
from moesr.runtime.loop import saved_steps
from moesr.runtime.loop.saved_steps import FOLDER, SavedLatents

RNG = np.random.default_rng(8)


class Killed(EngineError):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), experts=2, reuse=True)


@pytest.fixture
def manifest(engine: Path) -> Manifest:
    return read_manifest(engine)


def failing_after(count: int) -> Any:
    """An expert that ends the process, as it were, after so many tiles; None never does."""
    left = [count]

    def expert(row: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        if left[0] == 0:
            raise Killed("killed")
        left[0] -= 1
        eps = eps_of(row)
        return eps, np.concatenate([eps, eps - 1])

    return expert


def shallow(row: Mapping[str, np.ndarray]) -> np.ndarray:
    return 0.5 * row["deep"][3:] + 0.4 * row["z_t"]


def functions(count: int) -> dict[str, Any]:
    expert = failing_after(count)
    return {"expert_0": expert, "expert_1": expert, "shallow_0": shallow, "shallow_1": shallow}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"sampler": "dpm++2m", "tiling": "shifted"},
    {"reuse": 2},
    {"guidance": 1.0, "start_step": 1, "tileable": True},
]


def job_of(rig: Rig, latents: SavedLatents, **options: Any) -> Any:
    rng = np.random.default_rng(1)
    lr = rng.integers(0, 256, (96, 160, 3), np.uint8)
    job = rig.job(24, 40, lr, steps=9, checkpoint_every=2, **options)
    job._condition = lr[::4, ::4].copy()
    layout = job.settings.layout(rig.manifest, 24, 40)
    job = type(job)(layout, job.lr, job._condition, job.settings)
    job.keep_steps(latents)
    return job


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("gpu", [False, True], ids=["host", "gpu"])
def test_an_image_goes_on_after_its_last_saved_step(
    manifest: Manifest, tmp_path: Path, options: dict[str, Any], gpu: bool
):
    if gpu and "tileable" in options:
        pytest.skip("textures are for the host")

    def rig_of(count: int, name: str) -> Rig:
        if gpu:
            return CudaRig(manifest, tmp_path / name, 2, **functions(count))
        return Rig(manifest, 2, **functions(count))

    latents = SavedLatents(tmp_path, "engine")
    whole = job_of(rig_of(-1, "a"), latents, **options)
    whole.saved = None
    rig_of(-1, "b").run(whole)
    killed = job_of(rig_of(-1, "c"), latents, **options)
    with pytest.raises(EngineError, match="killed"):
        rig_of((3 if "reuse" in options else 5) * len(killed.layout.sampling), "d").run(killed)
    assert killed.saved.path.exists()
    rig, again = rig_of(-1, "e"), job_of(rig_of(-1, "f"), latents, **options)
    rig.run(again)
    np.testing.assert_array_equal(again.image, whole.image)
    assert again.ran == again.planned
    done = sum(sum(session.batches) for session in rig.sessions.values())
    assert done < again.planned.total()


def test_other_settings_and_inputs_have_other_files(manifest: Manifest, tmp_path: Path):
    latents, rig = SavedLatents(tmp_path, "engine"), Rig(manifest)
    paths = {
        job_of(rig, latents).saved.path,
        job_of(rig, latents, seed=7).saved.path,
        job_of(rig, SavedLatents(tmp_path, "another")).saved.path,
    }
    other = job_of(rig, latents)
    other.lr[0, 0, 0] ^= 1
    other.keep_steps(latents)
    assert len({*paths, other.saved.path}) == 4
    assert job_of(rig, latents).saved.path in paths


def saved_file(manifest: Manifest, latents: SavedLatents) -> Path:
    """The file of an image that was ended half-way."""
    killed = job_of(Rig(manifest), latents)
    with pytest.raises(EngineError, match="killed"):
        Rig(manifest, **functions(4 * len(killed.layout.sampling))).run(killed)
    return killed.saved.path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def foreign(path: Path) -> None:
    with np.load(path) as data:
        values = dict(data)
    np.savez(path, **(values | {"key": "0" * 64}))


def of_another_shape(path: Path) -> None:
    with np.load(path) as data:
        values = dict(data)
    np.savez(path, **(values | {"z": values["z"][:, :-1]}))


def not_finite(path: Path) -> None:
    with np.load(path) as data:
        values = dict(data)
    values["z"][0, 0, 0] = np.nan
    np.savez(path, **values)


@pytest.mark.parametrize("damage", [cut, flipped, foreign, of_another_shape, not_finite])
def test_files_that_do_not_fit_are_ignored_with_a_warning(
    manifest: Manifest, tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
):
    latents = SavedLatents(tmp_path, "engine")
    path = saved_file(manifest, latents)
    damage(path)
    caplog.set_level(logging.WARNING, "moesr")
    again, whole = (job_of(Rig(manifest), latents) for _ in range(2))
    whole.saved = None
    Rig(manifest, **functions(-1)).run(again)
    Rig(manifest, **functions(-1)).run(whole)
    np.testing.assert_array_equal(again.image, whole.image)
    assert [m for m in caplog.messages if "saved steps are ignored" in m and path.name in m]


def test_a_place_that_cannot_be_written_is_one_warning(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / FOLDER).write_text("not a directory")
    caplog.set_level(logging.WARNING, "moesr")
    job = job_of(Rig(manifest), SavedLatents(tmp_path, "engine"))
    Rig(manifest, **functions(-1)).run(job)
    assert job.image is not None
    assert len([m for m in caplog.messages if "steps cannot be saved" in m]) == 1


def test_old_files_are_removed(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    latents = SavedLatents(tmp_path, "engine")
    path = saved_file(manifest, latents)
    job_of(Rig(manifest), latents, seed=3)
    assert path.exists()
    monkeypatch.setattr(saved_steps, "UNUSED_AGE_S", -1)
    job_of(Rig(manifest), latents, seed=3)
    assert not path.exists()


def test_files_go_when_the_result_is_there(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image = RNG.integers(0, 256, (20, 20, 3), np.uint8)
    lr, cache = tmp_path / "lr.png", tmp_path / "cache"
    Image.fromarray(image).save(lr)
    folder, seen = cache / FOLDER, []
    real = writing.save

    def save(*arguments: Any) -> None:
        seen.extend(folder.iterdir())
        real(*arguments)

    monkeypatch.setattr(writing, "save", save)
    given = ["--engine", str(engine), "--steps", "6", "--checkpoint-every", "2", "--cache", str(cache)]
    assert main([str(lr), "-o", str(tmp_path / "a.png"), *given]) == 0
    assert len(seen) == 1 and not list(folder.iterdir())
    with Upscaler(engine, cache=cache) as up:
        want = reading.load(tmp_path / "a.png").pixels
        np.testing.assert_array_equal(up(image, steps=6, checkpoint_every=2), want)
        assert not list(folder.iterdir())
