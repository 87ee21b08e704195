"""The latency benchmark end to end on a narrow model."""

from __future__ import annotations

import json

import latency
import pytest

ARGUMENTS = ["--width", "32", "--channels", "32", "--tile", "64", "--steps", "2", "--repeats", "1"]


def test_measures_both_and_says_where_time_goes(tmp_path, capsys):
    page = tmp_path / "pages" / "latency.md"
    assert latency.main([*ARGUMENTS, "--threads", "1", "--json", "-o", str(page)]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in result["rows"]}
    assert {"load", "step", "decode", "image (2 steps)", "peak memory"} <= rows.keys()
    for row in rows.values():
        assert row["engine"] > 0 and row["ratio"] == pytest.approx(row["eager"] / row["engine"])
    assert rows["image (2 steps)"]["eager"] > rows["step"]["eager"]
    assert 0.05 < rows["peak memory"]["eager"] < 8
    assert all(proof["relative_l2"] < 1e-4 for proof in result["parity"].values())
    assert any(name.startswith("decoder") for name in result["where"]["decoder"]["modules"])
    text = page.read_text()
    assert "one tile of 64 px" in text and "| decode (s) |" in text


def test_refuses_a_tile_that_cannot_be(capsys):
    assert latency.main(["--tile", "100"]) == 2
    assert "try 96 or 128" in capsys.readouterr().err
