"""StableSR's latency benchmark runs on narrow networks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import stablesr_latency
from stablesr import NARROW

from moesr.runtime.engine.graph_spec import TensorSpec


@pytest.mark.slow
def test_every_graph_is_measured_in_engine_and_pytorch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stablesr_latency, "StableSRConfig", lambda name: NARROW)
    args = ["--tile", "128", "--repeats", "1", "--threads", "1", "--work", str(tmp_path / "work")]
    assert stablesr_latency.main([*args, "--prepare"]) == 0
    assert capsys.readouterr().out == ""
    (manifest,) = (tmp_path / "work").glob("tile-128-*/engine-128/manifest.json")
    made = manifest.stat().st_mtime_ns
    page = tmp_path / "page.md"
    assert stablesr_latency.main([*args, "--json", "-o", str(page)]) == 0
    assert manifest.stat().st_mtime_ns == made
    result = json.loads(capsys.readouterr().out)
    assert [graph["what"] for graph in result["graphs"]] == ["step", "encoding", "decoding"]
    for graph in result["graphs"]:
        assert graph["macs"] > 0 and len(graph["rows"]) == 4
        assert all(row["engine"] > 0 and row["eager"] > 0 for row in graph["rows"])
    step, encoding, decoding = (graph["rows"][2] for graph in result["graphs"])
    want = 200 * step["eager"] + encoding["eager"] + decoding["eager"]
    assert result["image"]["eager"] == pytest.approx(want)
    assert all(proof["relative_l2"] < 1e-4 for proof in result["parity"].values())
    text = page.read_text()
    assert "one tile of 128 px" in text and "| decoding: peak memory (GB) |" in text


def test_page_gives_rates_for_runs_only():
    rows = [
        {"what": "step: load", "unit": "s", "engine": 2.0, "eager": 4.0},
        {"what": "step", "unit": "s", "engine": 0.5, "eager": 1.0},
    ]
    result = {
        "origin": "Command: .. Commit: .. Machine: ..",
        "load_average": None,
        "settings": {"tile": 512, "threads": 2, "repeats": 3},
        "graphs": [{"what": "step", "macs": 10**11, "rows": rows}],
        "image": {"what": "image", "unit": "s", "engine": 100.0, "eager": 200.0},
        "params": 10**9,
        "stored": "fp32",
        "parity": {"expert_0": {"relative_l2": 1.5e-6}},
    }
    lines = stablesr_latency.markdown(result).splitlines()
    assert lines[8:11] == [
        "| step: load (s) | 2 | 4 | 2.00 |  |",
        "| step (s) | 0.5 | 1 | 2.00 | 200 |",
        "| image (s) | 100 | 200 | 2.00 |  |",
    ]
    assert lines[-1] == "Parity of expert_0: relative L2 error 1.5e-06 against the network."


def test_inputs_have_the_size_of_one_tile():
    spec = TensorSpec("t", "float32", ("B",)), TensorSpec("z_t", "float32", ("B", 4, 8, 8))
    graph = SimpleNamespace(inputs=spec)
    values = stablesr_latency.inputs(graph)  # type: ignore[arg-type]
    assert values["t"].tolist() == [500.0] and values["z_t"].shape == (1, 4, 8, 8)


def test_impossible_tile_is_refused(capsys):
    assert stablesr_latency.main(["--tile", "100"]) == 2
    assert "try 64 or 128" in capsys.readouterr().err
