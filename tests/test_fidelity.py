"""The measurement of what fidelity trades."""

from __future__ import annotations

import fidelity
import numpy as np
import pytest
from engines import build_engine
from PIL import Image
from skimage import data
from skimage.filters import gaussian

from moesr.runtime.errors import UsageError


def test_sharpness_is_a_share_of_the_originals():
    hr = data.chelsea()[:96, :96]
    soft = np.rint(gaussian(hr, 2, channel_axis=2, preserve_range=True)).astype(np.uint8)
    assert fidelity.sharpness(hr, hr, 4) == 1.0
    assert 0.1 < fidelity.sharpness(soft, hr, 4) < 0.7


def test_table_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "hr").mkdir()
    Image.fromarray(data.chelsea()[40:104, 200:264]).save(tmp_path / "hr" / "fur.png")
    options = ["--engine", str(build_engine(tmp_path / "engine")), "--hr", str(tmp_path / "hr")]
    options += ["--weights", "0", "1", "--steps", "4", "-o", str(tmp_path / "out")]
    assert fidelity.main(options) == 0
    rows = (tmp_path / "out" / "fidelity.md").read_text("utf-8").splitlines()[4:]
    assert [row.split("|")[1].strip() for row in rows] == ["bicubic", "0", "1"]
    assert Image.open(tmp_path / "out" / "fidelity.png").width > 300


def test_engine_of_another_scale(tmp_path, capsys):
    options = ["--engine", str(build_engine(tmp_path / "engine")), "--degrade", "x8-bicubic"]
    assert fidelity.main([*options, "-o", str(tmp_path / "out")]) == UsageError.exit_code
    assert "upscales by 4; choose a degradation of that scale" in capsys.readouterr().err
