"""The benchmark of large images: one small size for real, and what the page says about the targets."""

from __future__ import annotations

from pathlib import Path

import large
import pytest
from engines import build_engine
from large import Row


@pytest.mark.parametrize("more", [[], ["--memory-only"]], ids=["whole", "memory"])
def test_a_small_size(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]):
    engine = build_engine(tmp_path / "engine", steps=2)
    page = tmp_path / "page.md"
    sizes = ["--megapixels", "0.04", "--steps", "1", "--work", str(tmp_path), *more]
    code = large.main(["--engine", str(engine), "-o", str(page), *sizes])
    text = page.read_text()
    assert code == 0 and text.strip() in capsys.readouterr().out
    row = next(line for line in text.splitlines() if "50x50" in line).split("|")
    assert row[4].strip() == "not measured" if more else float(row[4]) > 0
    assert 20 < float(row[7]) < 1000 and float(row[9]) >= float(row[7])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "page.md"]


def test_a_failed_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "engine").mkdir()
    code = large.main(["--engine", str(tmp_path / "engine"), "-o", str(tmp_path / "page.md")])
    assert code == 3 and not (tmp_path / "page.md").exists()
    capsys.readouterr()


def test_rounds_give_the_median_time_and_the_largest_memory():
    rows = [Row(1.0, 250, 16, t, m, 10, m + 5, 0.5) for t, m in ((9.0, 7), (30.0, 8), (10.0, 9))]
    assert large.merged(rows) == Row(1.0, 250, 16, 10.0, 9, 10, 14, 0.5)


def test_the_verdict_compares_sizes_from_1_to_100_megapixels():
    rows = [
        Row(0.25, 125, 4, 9.0, 100, 10, 105, 0.0),
        Row(1.0, 250, 16, 10.0, 200, 10, 205, 0.0),
        Row(100.0, 2500, 1600, 1150.0, int(1.5e9), 10, int(1.6e9), None),
    ]
    lines = large.verdict(rows)
    assert "15 % above the smallest" in lines[0] and "15 % above the smallest" in lines[1]
    assert "1.60 GB at 100 megapixels" in lines[2]
    assert large.resident(-1) == (0, 0, 0)
