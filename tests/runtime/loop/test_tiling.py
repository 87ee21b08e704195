"""The tilings of a large image, the start step, and textures whose opposite sides meet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seams
from engines import build_engine
from PIL import Image
from rigs import CudaRig, Rig, alike, eps_of, unit

from moesr.runtime import Upscaler
from moesr.runtime.cli import info
from moesr.runtime.cli.run import main
from moesr.runtime.engine.framing import Framing
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import InputError, UsageError
from moesr.runtime.images import provenance, wrapping
from moesr.runtime.images.color import fix_color
from moesr.runtime.images.resize import imresize
from moesr.runtime.loop.settings import resolve
from moesr.runtime.loop.tile_layout import TileLayout, usual_tiling
from moesr.runtime.sampling import noise, samplers
from moesr.runtime.sampling.schedule import StepTable
from moesr.runtime.serve.problems import Problem
from moesr.runtime.serve.upload import check_options

RNG = np.random.default_rng(21)
STABLESR = Framing(small="enlarge", resize="torch", overlap=8, tiling="stablesr")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of 64 output pixels, 16 of the latent."""
    return build_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def manifest(engine: Path) -> Manifest:
    return read_manifest(engine)


def at_its_place(row: dict[str, np.ndarray]) -> np.ndarray:
    """Differs over the tile, so that a result depends on where the borders of tiles are."""
    ramp = np.linspace(0, 0.2, row["z_t"].shape[-1], dtype=np.float32)
    return eps_of(row) + ramp + ramp[:, None]


class TiledRig(Rig):
    """A rig whose jobs have the tiling of their settings."""

    def job(self, height: int, width: int, lr: np.ndarray | None = None, **options: Any) -> Any:
        job = super().job(height, width, lr, **options)
        layout = job.settings.layout(self.manifest, job.layout.height, job.layout.width)
        return type(job)(layout, job.lr, job._condition, job.settings)


class TiledCudaRig(CudaRig, TiledRig):
    """The same on the simulated GPU."""


def test_the_grid_moves_at_every_step_and_keeps_its_number_of_tiles(manifest: Manifest):
    layout = TileLayout(manifest, 60, 41, "shifted")
    grids = [layout.sampling_at(move) for move in range(30)]
    assert len(set(map(len, grids))) == 1 and len(set(map(tuple, grids))) > 20
    assert len(grids[0]) < len(TileLayout(manifest, 60, 41).sampling)
    assert grids == [TileLayout(manifest, 60, 41, "shifted").sampling_at(move) for move in range(30)]


def plain_loop(table: StepTable, cond: np.ndarray, z: np.ndarray, start: int = 0) -> np.ndarray:
    """The latent after all steps from `start` on, of the rigs' expert over the whole canvas at once."""
    scratch = np.empty_like(z)
    for step in range(start, len(table)):
        eps = 0.9 * z + 0.1 * cond + np.float32(1e-4) * np.float32(table.t[step])
        c = samplers.coefficients(table, step)
        samplers.advance(z, eps.astype(np.float32), noise.gaussian(1, step, z.shape), c, scratch)
    return z


def test_moving_tiles_of_point_wise_graphs_equal_the_plain_loop(manifest: Manifest):
    rig = TiledRig(manifest, max_batch=2)
    job = rig.job(60, 41, steps=6, tiling="shifted")
    rig.run(job)
    table = samplers.SAMPLERS["ddpm"].table(manifest.schedule, 6, manifest.expert_ranges)
    cond, z = unit(job._condition), noise.gaussian(1, noise.INITIAL_NOISE, (3, 60, 41))
    z = plain_loop(table, cond, z)
    want = unit(job.lr) + 0.05 * z.repeat(4, 1).repeat(4, 2)
    np.testing.assert_allclose(job.image, want, atol=1e-5)


@pytest.mark.parametrize("max_batch", [1, 3])
def test_a_result_depends_on_no_other_image(manifest: Manifest, max_batch: int):
    def run(count: int, batch: int) -> np.ndarray:
        rig = TiledRig(manifest, batch, expert=at_its_place)
        jobs = alike(rig, tiling="shifted", steps=5)
        rig.run(*jobs[1 : 1 + count])
        assert jobs[1].image is not None
        return jobs[1].image

    np.testing.assert_array_equal(run(1, 1), run(2, max_batch))


def test_the_gpu_moves_its_tiles_alike(manifest: Manifest, tmp_path: Path):
    images = []
    for rig in (
        TiledRig(manifest, 2, expert=at_its_place),
        TiledCudaRig(manifest, tmp_path, 2, expert=at_its_place),
    ):
        jobs = alike(rig, tiling="shifted", steps=4)
        rig.run(*jobs)
        images.append([job.image for job in jobs])
    for host, gpu in zip(*images, strict=True):
        np.testing.assert_allclose(gpu, host, atol=2e-6)


def test_defaults_and_records(manifest: Manifest, tmp_path: Path):
    assert resolve(manifest).recorded()["tiling"] == "shifted"
    assert "tiling" not in resolve(manifest, tiling="overlap").recorded()
    stablesr = read_manifest(build_engine(tmp_path, framing=STABLESR))
    assert usual_tiling(stablesr) == "overlap" and "tiling" not in resolve(stablesr).recorded()
    assert not {"tileable", "start_step"} & resolve(manifest).recorded().keys()
    with pytest.raises(UsageError, match="tiling is 'wide', expected one of overlap, shifted"):
        resolve(manifest, tiling="wide")


def test_steps_that_are_left_out_open_no_expert(manifest: Manifest):
    rig = TiledRig(manifest)
    job = rig.job(16, 16, steps=8, start_step=5)
    rig.run(job)
    assert rig.opened == ["expert_1", "expert_0", "decoder"] and job.ran == job.planned
    table = samplers.SAMPLERS["ddpm"].table(manifest.schedule, 8, manifest.expert_ranges)
    cond, a = unit(job._condition), table.alpha_bar[5]
    z = np.sqrt(1 - a) * noise.gaussian(1, noise.INITIAL_NOISE, (3, 16, 16)) + np.sqrt(a) * cond
    z = plain_loop(table, cond, z.astype(np.float32), start=5)
    np.testing.assert_allclose(job.image, unit(job.lr) + 0.05 * z.repeat(4, 1).repeat(4, 2), atol=1e-5)


def test_a_start_step_begins_from_the_encoded_image(tmp_path: Path):
    encoded = read_manifest(build_engine(tmp_path, encoder=True))
    rig = TiledRig(encoded)
    job = rig.job(16, 16, steps=8, start_step=7, sampler="dpm++2m")
    rig.run(job)
    assert rig.opened == ["encoder", "expert_0", "decoder"]
    assert np.isfinite(job.image).all()


@pytest.mark.parametrize("value", [-1, 4, 1.5, True])
def test_start_steps_that_leave_no_step(manifest: Manifest, value: Any):
    with pytest.raises(UsageError, match=r"start_step is .*, expected a whole number from 0 to 3"):
        resolve(manifest, steps=4, start_step=value)


@pytest.mark.parametrize("tiling", ["overlap", "shifted"])
@pytest.mark.parametrize("size", [(5, 7), (40, 23), (16, 16)], ids=str)
def test_textures_wrap_around(manifest: Manifest, size: tuple[int, int], tiling: str):
    """Point-wise graphs give the same result as one plain loop over the whole texture."""
    rig = TiledRig(manifest, 2)
    job = rig.job(*size, tiling=tiling, tileable=True, steps=3)
    rig.run(job)
    assert job.layout.frame.canvas == (size[0] * 4, size[1] * 4)
    table = samplers.SAMPLERS["ddpm"].table(manifest.schedule, 3, manifest.expert_ranges)
    z = plain_loop(table, unit(job._condition), noise.gaussian(1, noise.INITIAL_NOISE, (3, *size)))
    np.testing.assert_allclose(job.image, unit(job.lr) + 0.05 * z.repeat(4, 1).repeat(4, 2), atol=1e-5)


def test_the_gpu_refuses_textures(manifest: Manifest, tmp_path: Path):
    rig = TiledCudaRig(manifest, tmp_path)
    with pytest.raises(UsageError, match=r"tileable .* CPU"):
        rig.run(rig.job(16, 16, tileable=True))


def test_sizes_that_cannot_wrap(tmp_path: Path):
    odd = read_manifest(build_engine(tmp_path, scale=2))
    with pytest.raises(InputError, match=r"5x6 pixels.*multiples of 2"):
        TileLayout(odd, 6, 5, wraps=True)


def texture(height: int, width: int) -> np.ndarray:
    """A periodic pattern with details down to a few pixels, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1) * 2 * np.pi
    waves = np.stack([np.sin(2 * y + x), np.cos(x * 3 - y), np.sin(x + 1) * np.cos(4 * y)], axis=-1)
    return np.rint(128 + 90 * waves).astype(np.uint8)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_textures_have_no_seam_across_the_wrap(method: str):
    lr = np.roll(texture(19, 23), 4, axis=1)
    with Upscaler("demo-x4", backend="onnxruntime", threads=1) as up:
        tileable, plain = (up(lr, steps=1, color_fix=method, tileable=wraps) for wraps in (True, False))
    assert tileable.shape == plain.shape == (76, 92, 3)
    assert seams.across_the_wrap(tileable) < 1.3 < 2 < seams.across_the_wrap(plain)


def test_resizing_and_color_of_textures_are_periodic():
    image = texture(12, 20)
    for size in ((48, 80), (6, 10), (30, 50), (25, 41)):
        resized = wrapping.resize(image, *size)
        rolled = wrapping.resize(np.roll(image, (6, 10), (0, 1)), *size)
        assert resized.shape == (*size, 3)
        if size[0] % 2 == size[1] % 2 == 0:
            np.testing.assert_array_equal(np.roll(resized, (size[0] // 2, size[1] // 2), (0, 1)), rolled)
    inner = slice(16, 32)
    np.testing.assert_array_equal(
        wrapping.resize(image, 48, 80)[inner, inner], imresize(image, 48, 80)[inner, inner]
    )
    sr, style = RNG.standard_normal((2, 40, 60)).astype(np.float32) * 0.3
    for method in ("adain", "wavelet"):
        fixed = wrapping.fix_color(sr, style, method)
        moved = wrapping.fix_color(np.roll(sr, 20, 1), np.roll(style, 20, 1), method)
        np.testing.assert_allclose(np.roll(fixed, 20, 1), moved, atol=2e-5)
    np.testing.assert_allclose(
        wrapping.fix_color(sr, style, "adain"), fix_color(sr, style, "adain"), atol=2e-3
    )


def test_every_program_takes_the_options(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lr, target = texture(20, 24), tmp_path / "sr.png"
    Image.fromarray(lr).save(tmp_path / "lr.png")
    given = ["--steps", "4", "--start-step", "2", "--tileable", "--checkpoint-every", "1"]
    assert main([str(tmp_path / "lr.png"), "-o", str(target), "--engine", str(engine), *given]) == 0
    options: dict[str, Any] = {"steps": 4, "start_step": 2, "tileable": True, "checkpoint_every": 1}
    with Upscaler(engine) as up:
        np.testing.assert_array_equal(np.asarray(Image.open(target)), up(lr, **options))
    record = provenance.read(target)
    assert record and record.settings["start_step"] == 2 and record.settings["tileable"] is True
    assert record.settings["tiling"] == "shifted" and "checkpoint_every" not in record.settings
    capsys.readouterr()
    assert main(["--info", str(target)]) == 0
    told = capsys.readouterr().out
    assert all(part in told for part in ("--start-step 2", "--tiling shifted", "--tileable"))
    older = replace(record, settings={"steps": 4})
    assert "--tiling overlap" in info.command(target, older)
    del options["checkpoint_every"]  # the service keeps no checkpoints
    texts = {name: str(value).lower() for name, value in options.items()} | {"tiling": "overlap"}
    values = check_options(texts, {"synthetic": up})
    assert options.items() <= values.items() and values["tiling"] == "overlap"
    with pytest.raises(Problem, match="checkpoint_every"):
        check_options(texts | {"checkpoint_every": "1"}, {"synthetic": up})
    with pytest.raises(Problem, match="tileable is 'maybe', expected true or false"):
        check_options({"tileable": "maybe"}, {"synthetic": up})
