"""A short form of the service's load test: equal results, refused requests, hostile requests."""

from __future__ import annotations

import json

import serving
from engines import build_engine


def test_short_load_test_finds_no_faults(tmp_path, capsys):
    engine = build_engine(tmp_path / "engine")
    page = tmp_path / "serving.md"
    options = ["--clients", "3", "--over", "8", "--steps", "30", "--seconds", "3", "-o", str(page)]
    assert serving.main(["--engine", str(engine), *options]) == 0
    text = page.read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    assert next(row[0].strip() for row in rows if row[0].strip() != "---") == "one at a time"
    assert "0 wrong results" in text and "a slow upload 408" in text
    assert text.count(" 413") >= 1 and "500 idle connections (an image in between) 408" in text


def test_rows_of_a_run_without_images():
    assert json.dumps(serving.Load("none").row())
