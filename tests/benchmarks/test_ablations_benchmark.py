"""benchmarks/ablations.py: one training per seed, and the table of differences."""

from __future__ import annotations

from pathlib import Path

import ablations
import pytest
from benchlib import metrics
from benchlib.tables import Record

NAMES = ("bicubic", *ablations.DECODERS, *ablations.EXPERTS)


def records(scores: dict[str, float]) -> list[Record]:
    return [Record("mean", n, dict.fromkeys(metrics.COLUMNS, scores.get(n, 25.0))) for n in NAMES]


def cell(page: str, row: str) -> str:
    """Return the first measure in a row of the page."""
    return next(line.split(" | ")[1] for line in page.splitlines() if line.startswith(f"| {row} |"))


def test_gains_larger_than_the_variation_between_seeds_are_bold():
    runs = {
        0: records({"all experts": 27.0, "no Space MoE": 26.0, "no sampling MoE": 27.1}),
        1: records({"all experts": 27.5, "no Space MoE": 26.4, "no sampling MoE": 27.2}),
        2: records({"all experts": 27.0, "no Space MoE": 26.1, "no sampling MoE": 27.1}),
    }
    page = ablations.section("x4-bicubic", runs)
    assert cell(page, "all experts") == "27.167 ± 0.289"
    assert cell(page, "Space MoE") == "**+1.000 ± 0.100**"
    assert cell(page, "sampling MoE") == "+0.033 ± 0.231"


def test_one_seed_gives_no_deviation():
    page = ablations.section("x4-blind", {0: records({"baseline decoder": 20.0})})
    assert cell(page, "baseline decoder") == "20.000" and cell(page, "LR fusion and AFF") == "+5.000"
    assert "**" not in page and "±" not in page


def test_every_seed_is_trained_separately(tmp_path: Path, monkeypatch, capsys):
    trained: list[tuple[Path, str]] = []

    def train_all(study: ablations.Study) -> dict[str, Path]:
        trained.append((study.out, study.changes[-1]))
        return {}

    def measure(models: object, args: object) -> dict[str, list[Record]]:
        return {kind: records({"all experts": 25.0 + len(trained)}) for kind in ablations.DEGRADATIONS}

    monkeypatch.setattr(ablations, "train_all", train_all)
    monkeypatch.setattr(ablations, "measure", measure)
    told = ["--run", "run", "--data", "photos", "--seeds", "3", "7", "-o", str(tmp_path)]
    assert ablations.main(told) == 0
    assert trained == [(tmp_path / "seed-3", "seed=3"), (tmp_path / "seed-7", "seed=7")]
    page = (tmp_path / "ablations.md").read_text()
    assert page in capsys.readouterr().out
    assert page.count("26.500 ± 0.707") == 2 * len(metrics.COLUMNS) and "over 2 seeds" in page


def test_run_without_a_checkpoint_is_reported(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        ablations.main(["--run", str(tmp_path), "--data", str(tmp_path), "-o", str(tmp_path / "out")])
    assert stop.value.code and "checkpoint" in capsys.readouterr().err
