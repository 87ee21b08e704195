"""The latency benchmark runs end to end on a narrow model; its table of configurations."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import latency
import pytest
from ladder import configurations, report, rounds, worker
from ladder.configurations import EAGER, RUNGS, Rung

from moesr.runtime.backends.selection import BACKENDS
from moesr.runtime.errors import MoesrError

ARGUMENTS = ["--quick", "--repeats", "1", "--threads", "1", "--json"]


def rung(name: str) -> Rung:
    return next(r for r in RUNGS if r.name == name)


def test_configurations_are_measured_in_turns_with_profiles(tmp_path, capsys):
    page = tmp_path / "pages" / "latency.md"
    words = ["--rungs", "plain graph", "autocast", "moesr float32, reuse", "moesr float32"]
    assert latency.main([*ARGUMENTS, *words, "-o", str(page)]) == 0
    result = json.loads(capsys.readouterr().out)
    found = {r["name"]: r for r in result["rungs"]}
    assert {EAGER.name, "ONNX Runtime, plain graph", "moesr float32"} <= found.keys()
    for r in found.values():
        assert r["image 20"] == pytest.approx(r["image"]) and 0 < r["image 20"] < r["image 50"]
        assert 0.05 < r["peak_bytes"] / 1e9 < 8
    for name in ("ONNX Runtime, plain graph", "moesr float32"):
        assert 0 < found[name]["step error"] < 1e-4 and 0 < found[name]["decode error"] < 1e-4
    coarse = found["PyTorch, bf16 autocast, channels last"]
    assert 1e-4 < coarse["step error"] < 0.3 and found[EAGER.name]["step error"] == 0
    ours = found["moesr float32"]
    assert ours["opened"] < ours["whole image of 2 steps"] and ours["first load"] > 0
    assert all(p["expert_0"] < 1e-4 for p in result["parity"].values())
    assert list(result["where"]) == ["moesr float32"]
    for roles in result["where"].values():
        assert any(name.startswith("decoder") for name in roles["decoder"]["modules"])
    text = page.read_text()
    assert "one tile of 64 px" in text and "| moesr float32 | 20 |" in text
    assert "- moesr float32: 2.2 times eager PyTorch, " in text


def test_impossible_tile_is_refused(capsys):
    assert latency.main(["--tile", "100"]) == 2
    assert "try 96 or 128" in capsys.readouterr().err


def test_number_of_full_steps_with_reuse():
    reuse = Rung("", "engine", reuse=2)
    assert [reuse.full(n) for n in (20, 50, 4, 1)] == [12, 26, 4, 1]
    assert replace(reuse, reuse=1).full(50) == 50 and replace(reuse, reuse=100).full(20) == 4


def test_image_times_are_sums_of_measured_parts():
    one = rounds.Measured(Rung("", "engine", reuse=2))
    one.seconds = {"step": [1.0, 2.0, 9.0], "shallow": [0.5], "decode": [10.0]}
    one.values = {"load": 3.0, "first step": 5.0, "first decode": 11.0}
    found = one.to_json()
    assert found["image 20"] == 12 * 2.0 + 8 * 0.5 + 10
    assert found["first image"] == 3 + 5 + 11 + 11 * 2.0 + 8 * 0.5


def test_targets_are_compared_with_the_time_of_the_products_alone():
    """The fast image has 8 full steps of 5e9 products, 12 shallow ones of 1e9 and a decode of 40e9."""
    eager = rounds.Measured(EAGER, {"step": [1.0], "decode": [20.0]})
    fast = rounds.Measured(rung("moesr int8, reuse 3"), {"step": [0.2], "shallow": [0.1], "decode": [2.0]})
    for one in (eager, fast):
        one.values = {"load": 0.0, "first step": 0.0, "first decode": 0.0}
    macs = {"plain": {}, "int8-reuse": {"expert_0": 5e9, "shallow_0": 1e9, "decoder": 40e9}}
    rungs_found = [one.to_json() for one in (eager, fast)]
    lines = report._targets({"rungs": rungs_found, "macs": macs, "limits": {"int8": 1e11}})
    least = 2 * (8 * 5 + 12 * 1 + 40) / 100
    assert lines[-1].startswith("- moesr int8, reuse 3: 9.0 times eager PyTorch, not reached (8.33).")
    assert lines[-1].endswith(f"would make it {40 / least:.1f}.")


def test_every_configuration_has_an_engine_and_an_arithmetic():
    assert RUNGS[0] is EAGER
    for r in RUNGS:
        assert r.way in worker.WAYS and r.arithmetic in ("fp32", "bf16", "int8")
        assert (r.engine in configurations.ENGINES) == (r.way in ("engine", "plain"))
    assert report.options(rung("moesr int8, reuse 3")) == {"reuse": 3}


def test_missing_backend_of_a_configuration_is_named(monkeypatch):
    assert configurations.obstacle(rung("moesr float32")) is None
    monkeypatch.delitem(BACKENDS, "openvino", raising=False)
    assert "openvino" in (configurations.obstacle(rung("moesr float32, OpenVINO")) or "")


def test_configuration_whose_process_fails_is_left_out(monkeypatch, capfd):
    broken = Rung("broken", "nothing")
    monkeypatch.setattr(latency, "RUNGS", (EAGER, broken))
    assert latency.main([*ARGUMENTS, "--rungs", "broken"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [r["name"] for r in result["rungs"]] == [EAGER.name]
    assert "ended with code" in result["skipped"]["broken"]


def test_configuration_whose_process_dies_while_measuring_is_left_out(monkeypatch, capfd):
    dies = Rung("dies", "dies")
    command = rounds._command

    def of_task(task: dict) -> list[str]:
        loaded = "print('{\"seconds\": 1.0}', flush=True)"
        return [sys.executable, "-c", loaded] if task["way"] == "dies" else command(task)

    monkeypatch.setattr(rounds, "_command", of_task)
    monkeypatch.setattr(latency, "RUNGS", (EAGER, dies))
    assert latency.main([*ARGUMENTS, "--rungs", "dies"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [r["name"] for r in result["rungs"]] == [EAGER.name]
    assert result["skipped"] == {"dies": "its process ended with code 0; see its message above"}


def test_work_is_kept_apart_by_size(tmp_path, monkeypatch):
    """Checkpoints and engines of another width must not be measured under this one's name."""
    places = []

    def stop(config, place, args):
        places.append(place)
        raise MoesrError("enough")

    monkeypatch.setattr(latency, "measure", stop)
    for width in ("32", "64"):
        assert latency.main(["--work", str(tmp_path), "--width", width]) == 1
    assert places[0] != places[1] and all(place.parent == tmp_path for place in places)
