"""`moesr-decode`: latents become images, in tiles without seams, and images are reconstructed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import TILE, tiny_engine
from PIL import Image
from seams import measure

from moesr.runtime.autoencoder import Autoencoder
from moesr.runtime.cli import info
from moesr.runtime.cli.decode import main
from moesr.runtime.images import measures, provenance
from moesr.training.checkpoint import load_checkpoint

CHELSEA = Path(__file__).resolve().parents[2] / "assets" / "chelsea_lr.png"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return tiny_engine(tmp_path_factory.mktemp("decode") / "engine")


@pytest.fixture(scope="module")
def network(engine):
    return load_checkpoint(engine.with_name("engine-checkpoint")).decoder()


@pytest.fixture
def latent():
    return np.random.default_rng(0).standard_normal((4, 8, 8)).astype(np.float32)


def run(engine, *args) -> int:
    return main(["--engine", str(engine), "--quiet", *map(str, args)])


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def decoded(network, latent, **options) -> np.ndarray:
    with torch.inference_mode():
        image = network.decode(torch.from_numpy(latent)[None], **options)[0]
    return ((image.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.abs(a - b).max() <= 1 and (a != b).mean() < 0.02


def test_latents_become_images(engine, network, latent, tmp_path, capsys):
    torch.save(torch.from_numpy(latent), tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", np.stack([latent, -latent]))
    out = tmp_path / "out"
    assert main(["--engine", str(engine), str(tmp_path), "-o", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b_1.png", "b_2.png"]
    assert "scaling factor 0.18215" in capsys.readouterr().err
    z = latent / 0.18215
    assert close(pixels(out / "a.png"), decoded(network, z))
    assert close(pixels(out / "b_2.png"), decoded(network, -z))
    record = provenance.read(out / "b_2.png")
    assert record and record.settings["latent"] == 2 and record.settings["scaling_factor"] == 0.18215
    assert info.command(out / "a.png", provenance.read(out / "a.png")).startswith("moesr-decode a.pt -o")


@pytest.mark.parametrize("option", ["--unscaled", "--no-refinement"])
def test_options(engine, network, latent, tmp_path, option):
    np.save(tmp_path / "z.npy", latent)
    assert run(engine, tmp_path / "z.npy", option) == 0
    z = latent if option == "--unscaled" else latent / np.float32(0.18215)
    assert close(pixels(tmp_path / "z.png"), decoded(network, z, refined=option == "--unscaled"))


def test_existing_results_are_kept(engine, latent, tmp_path, capsys):
    np.save(tmp_path / "z.npy", np.stack([latent, latent]))
    np.save(tmp_path / "other.npy", latent)
    args = (tmp_path / "z.npy", "--log", tmp_path / "log")
    assert run(engine, *args) == 0
    times = [(tmp_path / f"z_{i}.png").stat().st_mtime_ns for i in (1, 2)]
    assert run(engine, *args) == 0
    assert times == [(tmp_path / f"z_{i}.png").stat().st_mtime_ns for i in (1, 2)]
    assert run(engine, *args, "--unscaled") == 1
    assert "unscaled False (now True)" in capsys.readouterr().err
    assert run(engine, *args, "--unscaled", "--force") == 0
    statuses = [json.loads(line)["status"] for line in (tmp_path / "log").read_text().splitlines()]
    assert statuses == [*["done"] * 2, *["skipped"] * 2, "failed", *["done"] * 2]
    (tmp_path / "other.png").write_bytes(b"mine")
    assert run(engine, tmp_path / "other.npy") == 1
    assert (tmp_path / "other.png").read_bytes() == b"mine"
    assert "exists and is not a result" in capsys.readouterr().err


def test_inputs_that_fail_do_not_stop_others(engine, latent, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.full((4, 8, 8), np.nan, np.float32))
    np.save(tmp_path / "b.npy", np.zeros((3, 8, 8), np.float32))
    (tmp_path / "c.pt").write_bytes(b"no tensor")
    np.save(tmp_path / "d.npy", latent)
    assert run(engine, tmp_path, tmp_path / "missing.pt") == 1
    errors = capsys.readouterr().err
    for words in ("NaN or infinite", "3 channels", "c.pt: not a whole file", "missing.pt: no such file"):
        assert words in errors
    assert (tmp_path / "d.png").exists() and "Traceback" not in errors
    assert run(engine, tmp_path, "--fail-fast", "--force") == 1
    assert "stopped after the first failure" in capsys.readouterr().err


def test_wrong_usage(engine, latent, tmp_path, capsys):
    np.save(tmp_path / "z.npy", np.stack([latent, latent]))
    assert run(engine) == 2
    assert run(engine, tmp_path / "z.npy", "--quality", 50) == 2
    assert run(engine, tmp_path / "z.npy", "-o", tmp_path / "z.gif") == 2
    assert run(engine, tmp_path / "z.npy", "-o", tmp_path / "z.png") == 1  # two latents, one file
    assert run("demo-x4", tmp_path / "z.npy") == 3
    assert "moesr-run --engine" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(21, 13), (5, 3)], ids=["tiles", "smaller"])
def test_any_size_is_decoded_without_seams(engine, size):
    """A smooth latent shows seams best: the image must be as smooth at the borders of tiles as elsewhere."""
    y, x = np.mgrid[: size[0], : size[1]] / 8.0
    latent = np.stack([np.sin(y + k) + np.cos(x - k) for k in range(4)]).astype(np.float32)
    with Autoencoder(engine) as vae:
        image = vae.decode(latent)
        layout = vae.layout(8 * size[0], 8 * size[1])
        assert image.shape == (3, 8 * size[0], 8 * size[1])
        assert len(layout.coding) == (8 if max(size) > 8 else 1)
        picture = np.clip((image.transpose(1, 2, 0) + 1) / 2, 0, 1)
        assert measure(picture, layout.coding, layout) < 1.3
        if max(size) > 8:
            cut = picture.copy()
            cut[TILE // 2 + 24 :] += 0.5
            assert measure(cut, [(0, 0), ((TILE // 2 + 24) // 8, 0)], layout) > 1.3  # the measure sees a step


def test_reconstruction_is_measured(engine, network, tmp_path, capsys):
    Image.open(CHELSEA).convert("RGB").crop((0, 0, 64, 64)).save(tmp_path / "a.png")
    Image.open(CHELSEA).convert("L").crop((0, 0, 50, 70)).save(tmp_path / "b.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "tiny.png")
    out = tmp_path / "out"
    assert run(engine, tmp_path / "a.png", tmp_path / "b.png", "--reconstruct", "-o", out) == 0
    assert (out / "reconstruction.md").read_text() in capsys.readouterr().out
    assert Image.open(out / "reconstruction.png").size[0] == 3 * 264 + 8
    lines = [line.split(" | ") for line in (out / "reconstruction.md").read_text().splitlines()]
    assert [line[0] for line in lines[2:]] == ["| a.png", "| b.png", "| mean"]
    original = pixels(tmp_path / "a.png")
    unit = torch.from_numpy(original.transpose(2, 0, 1).astype(np.float32))[None] / 127.5 - 1
    with torch.inference_mode():
        latent = network.encode(unit)[0].numpy()
    for column, refined in ((1, False), (2, True)):
        planes = [measures.luma(image) for image in (decoded(network, latent, refined=refined), original)]
        assert float(lines[2][column]) == pytest.approx(measures.psnr(*planes), abs=0.02)
        assert float(lines[2][column + 4].strip(" |")) == pytest.approx(
            measures.spectrum_correlation(*planes), abs=1e-3
        )
    assert run(engine, tmp_path / "a.png", "--reconstruct", "-o", out) == 1  # the table exists
    assert run(engine, tmp_path / "tiny.png", "--reconstruct") == 1
    assert "SSIM needs 11" in capsys.readouterr().err


def test_engine_without_encoder_cannot_reconstruct(tmp_path, capsys):
    engine = tiny_engine(tmp_path / "engine", encoder=False, refinement="none")
    assert run(engine, CHELSEA, "--reconstruct") == 2
    assert "has no encoder" in capsys.readouterr().err
    np.save(tmp_path / "z.npy", np.zeros((4, 8, 8), np.float32))
    assert run(engine, tmp_path / "z.npy", "--no-refinement") == 2
    assert "has no refinement network" in capsys.readouterr().err


def test_structural_similarity_equals_that_of_scikit_image():
    from benchlib import metrics

    a, b = np.random.default_rng(0).uniform(16, 235, (2, 40, 33))
    assert measures.ssim(a, b) == pytest.approx(metrics.ssim(a, b), rel=1e-9)
