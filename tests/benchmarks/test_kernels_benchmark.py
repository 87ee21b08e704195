"""benchmarks/kernels.py: checks without a GPU; rows, timing and files on a simulated GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from moesr.kernels.registry import OPS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_gpu(bench, monkeypatch):
    monkeypatch.setattr(bench, "GPU", False)


def deployed(name: str, at: int = 0):
    """Return an operator that is timed on one of its test cases."""
    return dataclasses.replace(OPS[name], deployed=(OPS[name].cases[at],))


def test_kernels_are_checked_without_a_gpu(bench, no_gpu, monkeypatch, capsys):
    op = OPS["vq_nearest"]
    slow = dataclasses.replace(op.cases[1], slow=True)
    monkeypatch.setitem(bench.OPS, op.name, dataclasses.replace(op, cases=(op.cases[0], slow)))
    assert bench.main(["--op", op.name]) == 0
    out = capsys.readouterr().out
    assert "no GPU here" in out
    assert "1 cases of 1 kernels equal their references; --all checks the largest too" in out
    assert bench.main(["--op", op.name, "--all"]) == 0
    assert "2 cases of 1 kernels equal their references\n" in capsys.readouterr().out


def test_a_wrong_kernel_is_an_error(bench, no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(bench, "errors", lambda op, case, device: {"values": float("nan")})
    assert bench.main(["--op", "vq_nearest"]) == 1
    assert "vq_nearest odd-fp32: values has error nan, at most 0e+00" in capsys.readouterr().err


def test_rows_and_files_of_a_run(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    times = iter([(20.0, 19.0, 22.0), (10.0,), (30.0,)])
    limits = bench.Limits(2e12, 4e14)

    def clock(function):
        function()
        return next(times)

    (row,) = bench.time_all([deployed("attention", 6)], CPU, limits, clock, tmp_path / "kernels-here")
    cost = OPS["attention"].cost(OPS["attention"].cases[6].shape, "fp32")
    assert row.error <= row.tolerance
    assert (row.kernel_us, row.eager_us, row.compiled_us) == ((20.0, 19.0, 22.0), 10.0, 30.0)
    assert row.of_copy == pytest.approx(cost.bytes / 20e-6 / 2e12)
    assert row.of_matmul == pytest.approx(cost.flops / 20e-6 / 4e14)
    text = (tmp_path / "kernels-here.md").read_text()
    assert "| attention | short-fp32 |" in text
    assert "20.0 (19.0, 22.0) | 10.0 | 30.0" in text
    assert "| aff_filter full512-fp16 under 250 us | not measured |" in text
    assert "| none slower than PyTorch's own | no: attention short-fp32 |" in text
    content = json.loads((tmp_path / "kernels-here.json").read_text())
    assert content["limits"] == {"bytes_per_s": 2e12, "flops_per_s": 4e14}
    assert content["rows"][0]["kernel_us"] == [20.0, 19.0, 22.0]


def test_row_gives_the_reason_if_pytorch_fails(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def clock(function):
        if calls:
            raise RuntimeError("out | of\nmemory")
        calls.append(function)
        return 5.0, 4.0, 6.0

    calls: list[object] = []
    row = bench.measure(
        deployed("vq_nearest"), OPS["vq_nearest"].cases[0], CPU, bench.Limits(1.0, 1.0), clock
    )
    assert row.eager_us == row.compiled_us == "RuntimeError: out / of memory"
    assert row.fastest_of_pytorch == float("inf")
    assert row.markdown().count(" | ") == len(bench.COLUMNS) - 1


def test_wrong_kernel_is_not_timed(bench, monkeypatch):
    monkeypatch.setattr(bench, "errors", lambda op, case, device: {"y": 0.5})
    case = OPS["aff_filter"].cases[0]
    row = bench.measure(OPS["aff_filter"], case, CPU, bench.Limits(1.0, 1.0), None)
    assert not row.kernel_us
    assert "5.0e-01, at most 1e-05: not timed" in row.markdown()
    assert row.markdown().count("|") == len(bench.COLUMNS) + 1


@pytest.mark.parametrize(
    ("kernel_us", "flops", "of_copy", "met"),
    [(249.0, 251e12, 0.71, "yes"), (250.0, 250e12, 0.7, "no")],
)
def test_goals_are_met_or_missed(bench, kernel_us, flops, of_copy, met):
    rows = [
        bench.Row(target.op, target.case, 0.0, 1.0, (kernel_us,) * 3, flops_per_s=flops, of_copy=of_copy)
        for target in bench.GOALS
    ]
    lines = list(bench.verdicts(rows))
    assert [line.split(" | ")[1] for line in lines[1:4]] == [f"{met} |"] * 3
    for target in bench.GOALS:  # each goal names a case that is timed
        assert target.case in map(str, OPS[target.op].deployed)


class SimulatedCuda:
    """Streams, graphs and events of a simulated GPU whose clock counts launches."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.mode = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = {
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: None, "stream": self._nothing, "synchronize": lambda: None,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": self._capture, "Event": self._event, "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }  # fmt: skip
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(8, dtype=dtype))

    @contextmanager
    def _nothing(self, stream):
        yield

    @contextmanager
    def _capture(self, graph, stream):
        self.log.append("capture")
        yield

    def _event(self, enable_timing):
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", float(len(self.log)))
        event.elapsed_time = lambda end: end.at - event.at
        return event


def test_timing_replays_a_cuda_graph(bench, monkeypatch):
    cuda = SimulatedCuda()
    cuda.install(monkeypatch)
    assert bench.time_us(lambda: cuda.log.append("call")) == (1000.0, 1000.0, 1000.0)
    assert cuda.log.count("replay") == bench.RUNS
    assert cuda.log[-bench.RUNS - 2 : -bench.RUNS] == ["capture", "call"]
    assert cuda.mode == 0


def test_functions_that_synchronize_are_timed_without_a_cuda_graph(bench, monkeypatch):
    """In the debug mode "error" PyTorch raises at a synchronization, so the function is not captured."""
    cuda = SimulatedCuda()
    cuda.install(monkeypatch)

    def reads_back():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        cuda.log.append("call")

    assert bench.time_us(reads_back)[0] == 1000.0
    assert "capture" not in cuda.log
    assert cuda.log.count("call") == bench.RUNS + bench.WARM_UP
    assert cuda.mode == 0


def test_names_of_results(bench):
    assert bench.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
