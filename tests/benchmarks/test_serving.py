"""A short form of the service's load test: equal results, refused requests, hostile requests."""

from __future__ import annotations

import pytest
import serving
from engines import build_engine
from load_test import fairness, hostile
from load_test.fairness import Fairness
from load_test.loads import Kind, Load
from load_test.page import Results, page


def test_short_load_test_finds_no_faults(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hostile, "IDLE", 100)
    monkeypatch.setattr(hostile, "PAUSE_S", 0.0)
    monkeypatch.setattr(fairness, "ROUNDS", 1)
    monkeypatch.setattr(serving, "SIZES", ((16, 16), (24, 16)))
    engine = build_engine(tmp_path / "engine")
    output = tmp_path / "serving.md"
    options = ["--clients", "3", "--over", "8", "--steps", "30", "--minutes", "0.05", "-o", str(output)]
    options += ["--small", "16", "--large", "256"]
    assert serving.main(["--engine", str(engine), *options]) == 0, capsys.readouterr().err
    text = output.read_text()
    assert "not finished" not in text and "| until minute |" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0]: row for row in rows if len(row) == 9 and row[0] not in ("load", "---")}
    assert len(table) == len(serving.kinds(3, 8))
    assert all(row[-1] == "0" and int(row[1]) > 0 for row in table.values())
    assert "an upload beyond the limit" in text
    assert "while one of 0.0655 megapixels is sampled" in text and "A folder of 6 images takes" in text


def test_the_page_of_an_unfinished_run_says_so():
    text = page(Results("demo-x4", 5, "Command", [(8, 8)], Fairness(8, 16), [Load(Kind("1 client", 1, 0.1))]))
    assert "not finished" in text and "| 1 client | 0 | 0.000 | - |" in text


@pytest.mark.parametrize(
    ("answer", "bad"), [("400", False), ("cut off", False), ("200", True), ("silent", True)]
)
def test_only_refusals_and_cut_connections_count_as_refused(answer, bad):
    sent = hostile.Hostile(serving.Server("127.0.0.1", 1), b"")
    sent.answers["x"][answer] += 1
    assert bool(sent.unrefused) == bad
