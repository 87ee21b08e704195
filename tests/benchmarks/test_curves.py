"""The plot of a training run: values read from the metrics log, and the image file."""

from __future__ import annotations

import json

import curves
import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def run(tmp_path):
    lines = [{"step": i, "loss": 2.0, "l1": float(i)} for i in range(250)]
    lines[100:100] = [{"step": 99, "val_psnr": 30.0}]
    lines.append({"step": 249, "val_psnr": 31.0})
    (tmp_path / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_series_are_read_from_the_log(run):
    steps, psnr = curves.series(run / "losses.jsonl", "val_psnr")
    assert steps.tolist() == [100, 250] and psnr.tolist() == [30.0, 31.0]
    assert [len(part) for part in curves.series(run / "losses.jsonl", "val_lpips")] == [0, 0]


def test_losses_are_averaged_over_windows(run):
    steps, l1 = curves.smoothed(*curves.series(run / "losses.jsonl", "l1"))
    assert steps.tolist() == [100, 200]
    np.testing.assert_allclose(l1, [49.5, 149.5])


def test_plot_of_a_run_is_written(run, tmp_path):
    pytest.importorskip("matplotlib")
    assert curves.main([str(run), "-o", str(tmp_path / "curve.png")]) == 0
    assert Image.open(tmp_path / "curve.png").width > 500


def test_run_without_a_log_is_reported(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert curves.main([str(tmp_path), "-o", str(tmp_path / "curve.png")]) == 2
    assert "losses.jsonl: no such file" in capsys.readouterr().err
