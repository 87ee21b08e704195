"""The canvases and tiles of images of any size, for MoE-SR and for StableSR."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_l2
from engines import build_engine
from stablesr import published_origins, published_weights
from torch.nn import functional as F

from moesr.runtime import EngineError, MemoryLimitError, Upscaler
from moesr.runtime.engine.framing import Framing
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest, write_manifest
from moesr.runtime.images import planes
from moesr.runtime.images.resize import imresize
from moesr.runtime.loop import processing
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import Frame, TileLayout
from moesr.runtime.sampling.tiles import gaussian_weights, tile_origins, weight_sum
from moesr.runtime.system import memory

STABLESR = Framing(small="enlarge", resize="torch", overlap=8, tiling="stablesr")
RNG = np.random.default_rng(12)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an engine with tiles of 64 output pixels, which are 16 latent pixels."""
    return build_engine(tmp_path_factory.mktemp("engine"), framing=STABLESR)


@pytest.fixture(scope="module")
def manifest(engine: Path) -> Manifest:
    return read_manifest(engine)


FRAMES = {
    # LR size: (MoE-SR's, StableSR's)
    (16, 16): (Frame((64, 64), (64, 64)), Frame((64, 64), (64, 64))),
    (8, 16): (Frame((32, 64), (64, 64)), Frame((64, 128), (64, 128))),
    (5, 7): (Frame((20, 28), (64, 64)), Frame((64, 89), (64, 92))),
    (1, 3): (Frame((4, 12), (64, 64)), Frame((64, 192), (64, 192))),
    (17, 40): (Frame((68, 160), (68, 160)), Frame((68, 160), (68, 160))),
}


@pytest.mark.parametrize("size", FRAMES, ids=str)
def test_frames(size: tuple[int, int], manifest: Manifest):
    padded, enlarged = FRAMES[size]
    assert TileLayout(replace(manifest, framing=Framing()), *size).frame == padded
    assert TileLayout(manifest, *size).frame == enlarged
    assert TileLayout(manifest, *size).latent == (enlarged.canvas[0] // 4, enlarged.canvas[1] // 4)


def test_factors_that_do_not_divide_the_scale(manifest: Manifest):
    """If images are padded, they are padded by whole LR pixels."""
    eight = replace(manifest, latent_factor=8, scale=4)
    assert TileLayout(eight, 17, 21).frame.canvas == (72, 88)
    assert TileLayout(replace(eight, framing=Framing()), 17, 21).frame.canvas == (72, 88)
    three = replace(manifest, latent_factor=4, scale=3, tile=64)
    assert TileLayout(three, 23, 23).frame.canvas == (72, 72)
    assert TileLayout(replace(three, framing=Framing()), 23, 23).frame.canvas == (72, 72)
    assert TileLayout(three, 22, 22).frame == Frame((66, 66), (68, 68))


@pytest.mark.parametrize(("tile", "overlap"), [(64, 32), (96, 32), (16, 8), (64, 48)])
@pytest.mark.parametrize("size", [0, 1, 31, 32, 100, 333], ids=lambda n: f"+{n}")
def test_published_tiles(size: int, tile: int, overlap: int):
    origins = tile_origins(tile + size, tile, overlap, strided=True)
    assert origins == published_origins(tile + size, tile, overlap)


@pytest.mark.parametrize("tile", [64, 96])
def test_published_window(tile: int):
    """The center is half a pixel low along a column; in float32 no scaling is needed."""
    want = np.outer(*published_weights(tile))
    np.testing.assert_allclose(gaussian_weights(tile, 0.5), want / want.max(), rtol=1e-6)
    assert not np.allclose(gaussian_weights(tile), want / want.max(), rtol=1e-3)


def test_manifest_selects_the_framing(manifest: Manifest):
    even = replace(manifest, framing=Framing())
    assert TileLayout(manifest, 20, 31).sampling[:4] == [(0, 0), (0, 8), (0, 15), (4, 0)]
    assert TileLayout(even, 20, 31).sampling[:4] == [(0, 0), (0, 7), (0, 15), (4, 0)]
    strided, evenly = TileLayout(manifest, 41, 77), TileLayout(even, 41, 77)
    for layout in (strided, evenly):
        assert weight_sum(41, 77, layout.sampling, layout.window).min() > 0
    assert len(strided.sampling) > len(evenly.sampling)


@pytest.mark.parametrize("size", [(28, 36), (7, 9), (14, 31), (64, 51)], ids=str)
def test_enlarging_as_in_torch(size: tuple[int, int]):
    image = RNG.uniform(0, 65535, (7, 9, 3)).astype(np.float32)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    want = F.interpolate(tensor, size=size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0).numpy()
    got = imresize(image, *size, antialias=False, convention="torch")
    np.testing.assert_allclose(got, want, atol=0.05)
    whole = imresize(image.astype(np.uint16), *size, antialias=False, convention="torch")
    assert np.abs(whole - want.clip(0, 65535)).max() <= 1.6  # rounded, as the source is


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (17, 40)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_image_with_stablesr_framing(engine: Path, size: tuple[int, int], dtype: type):
    """The synthetic decoder returns the LR image and a trace of the latent."""
    top = np.iinfo(dtype).max
    lr = (np.linspace(0.2, 0.8, size[0] * size[1] * 3).reshape(*size, 3) * top).astype(dtype)
    with Upscaler(engine, device="cpu") as up:
        sr = up(lr, color_fix="wavelet", sampler="ddim", steps=2)
    assert (sr.shape, sr.dtype) == ((size[0] * 4, size[1] * 4, 3), dtype)
    tensor = torch.from_numpy(lr.astype(np.float32)).permute(2, 0, 1)[None]
    want = F.interpolate(tensor, scale_factor=4, mode="bicubic")[0].permute(1, 2, 0).numpy()
    assert np.abs(sr - want).mean() < 0.05 * top


def test_model_receives_16_bits(manifest: Manifest):
    lr = RNG.integers(0, 256, (16, 20, 3), np.uint8)
    settings = Settings(steps=1, sampler="ddim", seed=0, fidelity=1.0)
    job = processing.prepare(TileLayout(manifest, 16, 20), planes.split(lr), settings)
    tensor = torch.from_numpy(lr.astype(np.float32)).permute(2, 0, 1)[None] / 255
    want = F.interpolate(tensor, scale_factor=4, mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1).numpy()
    assert job.lr.dtype == np.uint16
    assert relative_l2(job.lr / 65535, want) < 1e-4


def test_error_for_thin_images_names_the_enlarged_size(engine: Path, monkeypatch: pytest.MonkeyPatch):
    with Upscaler(engine, device="cpu") as up:
        monkeypatch.setattr(memory, "available_bytes", lambda: 50_000_000)
        with pytest.raises(MemoryLimitError, match="1000x1 to 4000x4 pixels, through 64000x64, needs about"):
            up(np.zeros((1, 1000, 3), np.uint8))


@pytest.mark.parametrize("overlap", [-1, 16])
def test_impossible_overlaps_are_refused(manifest: Manifest, tmp_path: Path, overlap: int):
    with pytest.raises(EngineError, match=rf"framing\.overlap is {overlap}, expected 0 to 15 latent pixels"):
        write_manifest(replace(manifest, framing=Framing(overlap=overlap)), tmp_path)
