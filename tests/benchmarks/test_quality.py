"""The quality benchmark runs end to end on a synthetic engine; tests of its parts."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import quality
import torch
from benchlib import figures, image_pairs, metrics, perceptual, tables
from engines import build_engine
from PIL import Image
from skimage import data

from moesr.runtime.errors import InputError, UsageError
from moesr.runtime.images.resize import imresize


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    return build_engine(tmp_path_factory.mktemp("quality") / "engine")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hr")
    photo = data.chelsea()
    Image.fromarray(photo[100:181, 100:170]).save(directory / "eye.png")  # 81 x 70 is cut to 80 x 64
    Image.fromarray(photo[40:104, 200:272]).convert("L").save(directory / "fur.png")
    (directory / "notes.txt").write_text("not an image")
    return directory


def run(engine: Path, originals: Path, out: Path, *options: str) -> int:
    argv = ["--engine", str(engine), "--hr", str(originals), "-o", str(out), "--threads", "1", *options]
    return quality.main(argv)


def test_originals_are_cut_to_multiples_of_eight(originals):
    loaded = image_pairs.load_originals(str(originals))
    assert {name: image.shape for name, image in loaded.items()} == {
        "eye.png": (80, 64, 3),
        "fur.png": (64, 72, 3),
    }
    np.testing.assert_array_equal(loaded["eye.png"], data.chelsea()[100:180, 100:164])


def test_demo_originals():
    loaded = image_pairs.load_originals("demo")
    assert list(loaded) == ["chelsea", "coffee", "rocket"]
    assert all(side % 8 == 0 for image in loaded.values() for side in image.shape[:2])


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", UsageError, "no such directory"),
        ("empty", UsageError, "no images"),
        ("damaged", InputError, r"a\.png"),
        ("small", InputError, "too few"),
    ],
)
def test_unusable_originals_are_refused(kind, error, message, tmp_path):
    if kind == "damaged":
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    elif kind == "small":
        Image.new("RGB", (31, 64)).save(tmp_path / "a.png")
    with pytest.raises(error, match=message):
        image_pairs.load_originals(str(tmp_path / "none" if kind == "missing" else tmp_path))


@pytest.mark.parametrize(("kind", "size"), [("x4-bicubic", (20, 16)), ("x8-bicubic", (10, 8))])
def test_bicubic_pairs_equal_imresize(kind, size, originals):
    hr = image_pairs.load_originals(str(originals))["eye.png"]
    np.testing.assert_array_equal(image_pairs.degrade(hr, kind, "eye.png"), imresize(hr, *size))


def test_blind_pairs_depend_only_on_the_file_name(originals):
    hr = image_pairs.load_originals(str(originals))["eye.png"]
    first, again, other = (image_pairs.degrade(hr, "x4-blind", name) for name in ("a.png", "a.png", "b.png"))
    assert first.shape == (20, 16, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_files_of_a_run(engine, originals, tmp_path, capsys):
    out = tmp_path / "new" / "results"
    assert run(engine, originals, out, "--steps", "4", "2", "--sampler", "ddpm", "ddim") == 0
    names = {path.name for path in out.iterdir()}
    assert {"quality.md", "quality.csv", "sheet_eye.png", "sheet_fur.png"} <= names
    with Image.open(out / "sheet_eye.png") as sheet:
        assert sheet.size == (4 * 64, 80 + figures.LABEL_PX)  # LR, bicubic, SR, HR

    with (out / "quality.csv").open(encoding="utf-8") as stream:
        rows = {(r["image"], r["method"]): r for r in csv.DictReader(stream)}
    methods = ["Bicubic", "DDPM 4", "DDPM 2", "DDIM 4", "DDIM 2"]
    assert list(rows) == [(image, m) for image in ("eye.png", "fur.png", "mean") for m in methods][:15]
    hr = image_pairs.load_originals(str(originals))["eye.png"]
    bicubic = imresize(imresize(hr, 20, 16), 80, 64)
    for name, value in metrics.scores(bicubic, hr, 4).items():
        assert float(rows["eye.png", "Bicubic"][name]) == pytest.approx(value)
    psnr = [float(rows[image, "DDPM 4"]["psnr"]) for image in ("eye.png", "fur.png", "mean")]
    assert psnr[2] == pytest.approx((psnr[0] + psnr[1]) / 2)

    # the synthetic decoder adds the latent, so results depend on the seed and zeros change the detail
    drawn = rows["eye.png", "DDPM 4"]
    assert 0.0 < float(drawn["seeds"]) < 60.0 and float(drawn["latent_share"]) != 0.0
    assert rows["eye.png", "Bicubic"]["seeds"] == ""

    page = (out / "quality.md").read_text(encoding="utf-8")
    assert page.strip() == capsys.readouterr().out.strip()
    assert "| DDIM 2 |" in page and "PSNR↑" in page and "Mean of 2 images" in page


def test_option_draws_degrades_an_original_several_times(engine, originals, tmp_path):
    blind = ("--degrade", "x4-blind", "--steps", "1")
    assert run(engine, originals, tmp_path / "once", *blind) == 0
    assert run(engine, originals, tmp_path / "thrice", *blind, "--draws", "3") == 0
    psnr = {}
    for name in ("once", "thrice"):
        with (tmp_path / name / "quality.csv").open(encoding="utf-8") as stream:
            psnr[name] = {
                r["image"]: float(r["psnr"]) for r in csv.DictReader(stream) if r["method"] == "Bicubic"
            }
    once, thrice = psnr["once"], psnr["thrice"]
    assert list(thrice) == [f"{n}{i}" for n in ("eye.png", "fur.png") for i in ("", " 2", " 3")] + ["mean"]
    assert once["eye.png"] == thrice["eye.png"] and len(set(thrice.values())) == 7
    assert thrice["mean"] == pytest.approx(sum(v for n, v in thrice.items() if n != "mean") / 6)
    assert sorted(p.name for p in (tmp_path / "thrice").glob("sheet_*")) == ["sheet_eye.png", "sheet_fur.png"]


def test_figures_need_matplotlib(engine, originals, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(engine, originals, tmp_path, "--steps", "1") == 0
    assert "pip install 'moesr[bench]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("spectra_*")) and not (tmp_path / "quality_vs_time.png").exists()
    assert (tmp_path / "quality.md").exists()


def test_figures_with_matplotlib(engine, originals, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'moesr[bench]'")
    assert run(engine, originals, tmp_path, "--steps", "1") == 0
    for name in ("spectra_eye.png", "spectra_fur.png", "quality_vs_time.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("L").getcolors() or range(99)) > 20


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--degrade", "x8-bicubic"], 2, "upscales by 4"),
        (["--hr", "/nowhere"], 2, "no such directory"),
        (["--engine", "/nowhere"], 3, "no such engine"),
        (["--steps", "1001"], 2, "expected a whole number"),
        (["--draws", "0"], 2, "expected 1 or more"),
        (["--draws", "2"], 2, "of a blind degradation only"),
    ],
    ids=["scale", "originals", "engine", "steps", "no draws", "draws of bicubic"],
)
def test_errors_are_reported(options, code, message, engine, originals, tmp_path, capsys):
    assert run(engine, originals, tmp_path, *options) == code
    err = capsys.readouterr().err
    assert "error: " in err and message in err


class FakeMetric:
    """A replacement for the metrics of pyiqa: LPIPS is the mean absolute difference, all others the mean."""

    def __init__(self, name: str) -> None:
        self.name, self.metric_mode = name, "FR" if name == "lpips" else "NR"

    def __call__(self, *inputs):
        if self.name == perceptual.FID:
            sets = [sorted(Path(d).glob("*.png")) for d in inputs]
            assert [len(s) for s in sets] == [2, 2]
            return 3.0
        if self.name == "niqe":
            raise ValueError("image too small")
        return (inputs[0] - inputs[1]).abs().mean() if self.metric_mode == "FR" else inputs[0].mean()


def create_metric(name: str, device: torch.device) -> FakeMetric:
    if name == "musiq":
        raise OSError("no network")
    return FakeMetric(name)


def test_learned_metrics_are_written(engine, originals, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create_metric))
    assert run(engine, originals, tmp_path, "--steps", "1") == 0
    err = capsys.readouterr().err
    assert "no musiq: no network" in err and "niqe failed here: image too small" in err
    with (tmp_path / "quality.csv").open(encoding="utf-8") as stream:
        rows = {(r["image"], r["method"]): r for r in csv.DictReader(stream)}
    hr = image_pairs.load_originals(str(originals))["eye.png"] / 255.0
    bicubic = imresize(imresize((hr * 255).astype(np.uint8), 20, 16), 80, 64) / 255.0
    got = rows["eye.png", "Bicubic"]
    assert float(got["lpips"]) == pytest.approx(np.abs(bicubic - hr).mean(), abs=1e-5)
    assert float(got["clipiqa"]) == pytest.approx(bicubic.mean(), abs=1e-5)
    assert got["niqe"] == "nan" and "musiq" not in got and got["fid"] == ""
    assert float(rows["mean", "DDPM 1"]["fid"]) == 3.0
    assert "| - |" in (tmp_path / "quality.md").read_text(encoding="utf-8")  # NIQE


def test_missing_pyiqa_is_reported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    assert perceptual.load() == {}
    assert "pip install pyiqa" in capsys.readouterr().err


def test_table_layout():
    records = [
        tables.Record("a", "Bicubic", {"psnr": 20.123, "ssim": 0.5, "seconds": 0.1}),
        tables.Record("b", "Bicubic", {"psnr": 30.123, "ssim": 0.7, "seconds": 0.3}),
    ]
    page = tables.markdown(records, tables.means(records)).splitlines()
    assert page[2:5] == [
        "| Method | PSNR↑ | SSIM↑ | seconds |",
        "| --- | ---: | ---: | ---: |",
        "| Bicubic | 25.12 | 0.6000 | 0.20 |",
    ]
    assert page[-1] == "| b | Bicubic | 30.12 | 0.7000 | 0.30 |"


def test_large_panels_show_the_center(tmp_path):
    image = np.zeros((1000, 600, 3), np.uint8)
    image[500, 300] = 255
    figures.contact_sheet({"LR": image, "HR": image}, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 512, 512 + figures.LABEL_PX)
        assert sheet.getpixel((256, 256 + figures.LABEL_PX)) == (255, 255, 255)
