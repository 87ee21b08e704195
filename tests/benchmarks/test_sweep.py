"""Sweeps of one setting on a synthetic engine: tables, pictures, and the effect of each value."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import sweep
from benchlib import image_pairs
from benchlib.figures import LABEL_PX
from benchmarks.test_quality import create_metric
from engines import build_engine
from PIL import Image
from skimage import data

from moesr.runtime.upscaler import Upscaler


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    prompts = ("a photograph", "a drawing")
    return build_engine(tmp_path_factory.mktemp("sweep") / "engine", steps=2, prompts=prompts)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hr")
    Image.fromarray(data.chelsea()[100:164, 100:172]).save(directory / "eye.png")
    Image.fromarray(data.chelsea()[40:104, 200:264]).save(directory / "fur.png")
    return directory


@pytest.fixture(autouse=True)
def no_pyiqa(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)


def run(engine: Path, out: Path, *options: object) -> int:
    return sweep.main(["--engine", str(engine), "-o", str(out), "--threads", "1", *map(str, options)])


def rows(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return {(row["image"], row["method"]): row for row in csv.DictReader(stream)}


def test_sweep_of_fidelity_over_originals(engine, photos, tmp_path, capsys):
    assert run(engine, tmp_path, "--hr", photos, "--fidelity", 0, 0.5, 1) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "fidelity.csv",
        "fidelity.md",
        "fidelity.png",  # plot of PSNR against sharpness
        "fidelity_eye.png",
        "fidelity_fur.png",
    ]
    found = rows(tmp_path / "fidelity.csv")
    assert [method for image, method in found if image == "mean"] == ["Bicubic", "w = 0", "w = 0.5", "w = 1"]
    hr = image_pairs.load_originals(str(photos))["eye.png"]
    with Upscaler(engine) as up:
        want = up(image_pairs.degrade(hr, "x4-bicubic", "eye.png"), fidelity=0.5, seed=42)
    assert float(found["eye.png", "w = 0.5"]["psnr"]) == pytest.approx(
        sweep.metrics.scores(want, hr, 4)["psnr"]
    )
    assert float(found["mean", "w = 1"]["psnr"]) > float(found["mean", "w = 0"]["psnr"])
    assert float(found["eye.png", "w = 0.5"]["sharpness"]) == pytest.approx(
        sweep.metrics.sharpness(want, hr, 4)
    )
    with Image.open(tmp_path / "fidelity_eye.png") as sheet:
        assert sheet.size == (6 * 72, 64 + LABEL_PX)  # LR, bicubic, three values and HR
        panel = np.asarray(sheet)[LABEL_PX:, 3 * 72 : 4 * 72]
    np.testing.assert_array_equal(panel, want)
    page = (tmp_path / "fidelity.md").read_text(encoding="utf-8")
    assert page.startswith("# Fidelity (Table 4): synthetic (fp32)") and page in capsys.readouterr().out
    assert "Held: steps 2, sampler ddpm, seed 42." in page


def test_all_settings_of_the_engine_are_swept_by_default(engine, photos, tmp_path):
    assert run(engine, tmp_path / "all", "--hr", photos, "--steps", 1) == 0
    assert {p.stem for p in (tmp_path / "all").glob("*.md")} == {"fidelity", "color_fix", "guidance"}
    plain = build_engine(tmp_path / "plain")
    assert run(plain, tmp_path / "none", "--hr", photos, "--steps", 1) == 0
    assert {p.stem for p in (tmp_path / "none").glob("*.md")} == {"fidelity", "color_fix"}


def test_setting_with_one_value_is_not_swept(engine, photos, tmp_path, capsys):
    """Without color correction the result of the synthetic engine depends on the guidance."""
    assert run(engine, tmp_path, "--hr", photos, "--guidance", "--color-fix", "none", "--fidelity", 1) == 0
    assert {p.stem for p in tmp_path.glob("*.md")} == {"guidance"}
    guided = rows(tmp_path / "guidance.csv")
    assert [m for image, m in guided if image == "mean"][1:] == ["s = 1", "s = 2.5", "s = 5", "s = 7.5"]
    assert guided["mean", "s = 1"]["psnr"] != guided["mean", "s = 5"]["psnr"]
    assert "fidelity 1.0, color_fix none" in capsys.readouterr().out


def test_sweep_of_images_without_originals(engine, photos, tmp_path, monkeypatch):
    """Measures that need an original are left out, and the sheet shows no original."""
    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create_metric))
    assert run(engine, tmp_path, "--lr", photos, "--color-fix", "none", "wavelet") == 0
    found = rows(tmp_path / "color_fix.csv")
    assert set(found["mean", "none"]) == {"image", "method", "niqe", "clipiqa", "seconds"}
    assert found["eye.png", "none"]["clipiqa"] != found["eye.png", "wavelet"]["clipiqa"]
    with Image.open(tmp_path / "color_fix_fur.png") as sheet:
        assert sheet.size == (4 * 256, 256 + LABEL_PX)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "2"], "--guidance: synthetic has none, it knows no negative prompt"),
        (["--fidelity", "2", "1"], "fidelity is 2.0, expected"),
        (["--degrade", "x8-bicubic"], "does not fit an engine that upscales by 4"),
        (["--lr", "absent"], "absent: no such directory of images"),
        (["--fidelity", "1"], "every setting has one value: nothing to sweep"),
        (["--hr", "absent"], "absent: no such directory of originals"),
    ],
    ids=["guidance", "fidelity", "scale", "images", "one value", "originals"],
)
def test_wrong_arguments_are_refused(options, message, photos, tmp_path, capsys):
    plain = build_engine(tmp_path / "plain")
    source = [] if {"--lr", "--hr"} & set(options) else ["--hr", photos]
    assert run(plain, tmp_path / "out", *source, *options) == 2
    assert message in capsys.readouterr().err
