"""benchmarks/gpu.py without a GPU: every section runs at tiny sizes on the simulated driver."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import pytest
import rehearse_gpu
import simulated_backend
import torch
import travel
from cuda_simulation import SimulatedDriver, write_kernels
from gpu_suite import alternatives as gpu_alternatives
from gpu_suite import cubins as gpu_cubins
from gpu_suite import device as gpu_device
from gpu_suite import engine as gpu_engine
from gpu_suite import kernels as gpu_kernels
from gpu_suite import networks as gpu_networks
from gpu_suite import report as gpu_report
from gpu_suite import runtime as gpu_runtime
from gpu_suite import setup as gpu_setup
from gpu_suite import stress as gpu_stress
from gpu_suite import torch_backend as gpu_backend
from gpu_suite.setup import Report, Setup

from moesr.kernels.registry import OPS
from moesr.runtime.backends import selection as backends
from moesr.runtime.devices import cuda_driver
from moesr.runtime.errors import EngineError
from moesr.training.networks import operators

FACTS = {"gpu": "NVIDIA Test 1", "capability": "9.0", "cuda": "13.0", "memory_gb": 80.0}


class Heard:
    """The results that a section reported."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.found = setup, gpu.empty()
        self.report = Report(self.say, setup)

    def say(self, kind: str, value: Any) -> None:
        json.dumps(value)  # values are sent between processes as JSON
        gpu.take(self.found, kind, value)

    def whats(self, who: str) -> list[tuple[str, int]]:
        return [(row["what"], row["batch"]) for row in self.found["rows"] if row["who"] == who]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a setup that holds the host's reference results and measured limits."""
    setup = Setup(16, 16, 32, (2,), (1, 2), tmp_path_factory.mktemp("cache"), seconds=600)
    gpu_networks.reference(setup)
    setup.limits.write_text(json.dumps({"bytes_per_s": 1e12, "flops_per_s": 1e14}))
    write_kernels(setup.engine / "kernels")
    return setup.cache


@pytest.fixture
def heard(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Heard:
    """The results of a section that takes few measurements on the simulated GPU."""
    quick = functools.partial(gpu_setup.seconds_each, at_least=0.0)
    for module in (gpu_device, gpu_networks, gpu_runtime):
        monkeypatch.setattr(module, "seconds_each", quick)
    monkeypatch.setattr(gpu_kernels, "seconds_each", lambda run, sync, _: quick(run, sync))
    monkeypatch.setattr(gpu_networks, "device_of", lambda: "cpu")
    monkeypatch.setattr(gpu_networks, "PRECISION", torch.float32)  # half is slow on a CPU
    monkeypatch.setattr(cuda_driver, "CudaDriver", lambda index: SimulatedDriver())
    monkeypatch.setattr(cuda_driver, "memory_bytes", lambda: (70 * 10**9, 80 * 10**9))
    for module in (gpu_device, gpu_runtime):
        monkeypatch.setattr(module, "absent_unless_there", lambda *modules: None)
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    return Heard(Setup(16, 16, 32, (2,), (1, 2), cache, seconds=600))


def held(heard: Heard) -> bool:
    assert heard.found["checks"]
    return all(check["held"] for check in heard.found["checks"])


def test_device_equals_the_host(heard: Heard):
    gpu_device.measure_device(heard.setup, heard.report)
    assert held(heard) and len(heard.found["checks"]) == 8
    for name in ("CUDA graphs", "launch by launch"):
        assert heard.whats(f"device, {name}") == [("tick without a network", 1)]


def test_wrong_results_of_the_device_are_detected(heard: Heard, monkeypatch: pytest.MonkeyPatch):
    from cuda_simulation import RUN

    blend = RUN["tile_blend"]
    monkeypatch.setitem(RUN, "tile_blend", lambda *a: (blend(*a), blend(*a)))
    gpu_device.measure_device(heard.setup, heard.report)
    assert not held(heard)


IMAGES = [("image of 2 steps", 1), ("image of 2 steps", 2)]
TICKS = [("step", 1), ("step", 2), ("decode", 1), ("decode", 2)]


@pytest.mark.parametrize(
    "failure", [None, RuntimeError, EngineError], ids=["none", "PyTorch's", "the driver's"]
)
def test_runtime_with_networks_of_pytorch(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, failure: type[Exception] | None
):
    def tensor_of(buffer: Any, batch: int) -> torch.Tensor:
        shape = buffer.spec.shape(batch)
        view = buffer.driver.view(buffer.address, int(np.prod(shape)), np.float32)
        return torch.from_numpy(view.reshape(shape))

    monkeypatch.setattr(gpu_backend, "tensor_of", tensor_of)
    monkeypatch.setattr(gpu_backend, "on_stream", lambda driver, run: driver.library_call("network", run))
    monkeypatch.setattr(gpu_backend, "ONE_GRAPH", True)
    if failure:  # the networks are then launched individually, and a note says so

        def fails(self: SimulatedDriver) -> None:
            raise failure("a CUDA graph could not be made")

        monkeypatch.setattr(SimulatedDriver, "begin_capture", fails)
    gpu_runtime.measure_pytorch(heard.setup, heard.report)
    who = f"runtime over PyTorch, {'launched' if failure else 'one graph'}"
    assert held(heard) and len(heard.found["notes"]) == bool(failure)
    whats = heard.whats(who)
    assert [what for what in whats if what in TICKS] == TICKS
    assert [what for what in whats if what in IMAGES] == IMAGES
    assert {"first image of 2 steps", "memory of the GPU in use"} <= {what for what, _ in whats}
    assert all(row["share"] for row in heard.found["rows"] if row["what"] in ("step", "decode"))


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_runtime_with_a_backend_library(heard: Heard, monkeypatch: pytest.MonkeyPatch, backend: str):
    """ONNX Runtime on the CPU replaces the library; TensorRT would run the decoder in parts."""
    monkeypatch.setitem(backends.BACKENDS, backend, simulated_backend.__name__)
    monkeypatch.setattr(gpu_runtime.importlib.util, "find_spec", lambda name: True)
    compiled = []

    def build(setup: Setup, directory: Path, manifest: Any, **given: Any) -> None:
        compiled.append(given["compiled"])
        write_kernels(directory / "kernels")

    monkeypatch.setattr(gpu_engine, "kernels_for", build)
    gpu_runtime.measure_library(heard.setup, heard.report, backend, ("library",))
    assert held(heard) and compiled == [backend == "tensorrt"]
    whats = heard.whats("runtime over library")
    assert [what for what in whats if what in (*TICKS, *IMAGES)] == [*TICKS, *IMAGES]
    directory = heard.setup.exported(backend)
    assert (directory / "decoder.parts.json").is_file() == (backend == "tensorrt")


def test_missing_library_is_named(heard: Heard, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_runtime.importlib.util, "find_spec", lambda name: None)
    gpu.run_section("tensorrt", heard.setup, heard.say)
    assert heard.found["absent"] == "none of tensorrt, tensorrt_rtx_bindings is installed"
    monkeypatch.setattr(gpu_runtime.importlib.util, "find_spec", lambda name: True)
    gpu.run_section("onnxruntime", heard.setup, heard.say)
    assert "onnxruntime 1." in heard.found["absent"] and "cannot use device 'cuda'" in heard.found["absent"]


def test_networks_without_kernels(heard: Heard):
    gpu_networks.measure_eager(heard.setup, heard.report)
    assert held(heard)
    assert heard.whats("PyTorch fp16, eager") == [("step", 1), ("decode", 1)]
    whats = heard.whats("PyTorch fp16, CUDA graphs")
    assert [what for what in whats if what in (*TICKS, *IMAGES)] == [
        IMAGES[0], TICKS[0], TICKS[2], IMAGES[1], TICKS[1], TICKS[3],
    ]  # fmt: skip


def test_networks_in_half_precision(heard: Heard, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_networks, "PRECISION", torch.float16)
    made, given = gpu_networks.calls(heard.setup, "cpu"), gpu_networks.tensors(heard.setup, "cpu")
    got = {role: made[role](*given[role]) for role in gpu_networks.ROLES}
    gpu_networks.check(heard.report, "half", got, heard.setup)
    assert held(heard) and min(check["error"] for check in heard.found["checks"]) > 1e-4


@pytest.fixture
def kernels_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the networks call the operators, which compute their references here."""
    from moesr.kernels import dispatch

    monkeypatch.setattr(operators, "has_kernels", lambda x: True)
    monkeypatch.setattr(dispatch, "has_kernels", lambda x: False)


def test_networks_with_kernels(heard: Heard, kernels_by_reference: None):
    gpu.run_section("pytorch with kernels", heard.setup, heard.say)
    assert held(heard) and heard.whats("PyTorch fp16 with our kernels") and not heard.found["failed"]


def test_half_precision_networks_use_kernels_for_their_float32_layers(
    heard: Heard, kernels_by_reference: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu_networks, "PRECISION", torch.float16)
    made, given = gpu_networks.calls(heard.setup, "cpu"), gpu_networks.tensors(heard.setup, "cpu")
    gpu_networks.check(heard.report, "half", {r: made[r](*given[r]) for r in gpu_networks.ROLES}, heard.setup)
    assert held(heard)
    with gpu_networks.without_kernels():
        assert not operators.has_kernels(given["decoder"][0])
    assert operators.has_kernels(given["decoder"][0])


def test_compiled_networks(heard: Heard, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda call, mode, dynamic: call)
    gpu_networks.measure_compiled(heard.setup, heard.report)
    assert held(heard)
    whats = heard.whats("torch.compile fp16")
    assert sorted(what for what in whats if what in TICKS) == sorted(TICKS)
    assert ("compiling a step", 1) in whats


def test_limits(heard: Heard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gpu_networks, "seconds_each", lambda run, sync: 0.5)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.zeros(8, dtype=torch.uint8))
    setup = Setup(cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda count, *size, **options: torch.zeros(count, 2, 2))
        gpu_networks.measure_limits(setup, heard.report)
    assert gpu_setup.rates(setup) == {"bytes_per_s": 32.0, "flops_per_s": 2 * 8192**3 / 0.5}


def test_kernels_are_checked_then_timed(heard: Heard, monkeypatch: pytest.MonkeyPatch):
    """The checks report an operator with wrong results and one whose launch fails."""
    pytest.importorskip("triton")
    op = OPS["tile_blend"]
    small = [min(op.cases, key=lambda case: op.cost(case.shape, case.dtype).bytes)]
    good = gpu_kernels_op(op, small, "tile_blend")
    other = next(case for case in OPS["tile_gather"].cases if not case.slow)
    bad = gpu_kernels_op(OPS["tile_gather"], [other], "none")
    monkeypatch.setattr(gpu_kernels, "OPS", {"good": good, "bad": bad})
    gpu_kernels.measure_kernels(heard.setup, heard.report)
    assert [check["held"] for check in heard.found["checks"]] == [True, False]
    assert heard.whats("kernel tile_blend") == [(str(small[0]), 1)]
    assert heard.found["rows"][0]["limit"] == "copy rate"
    assert "ModuleNotFoundError" in heard.found["notes"][0]


def gpu_kernels_op(op: Any, cases: list, name: str) -> Any:
    return dataclasses.replace(op, name=name, cases=tuple(cases), deployed=tuple(cases))


def test_preparation_writes_an_engine(heard: Heard):
    gpu.run_section("preparation", heard.setup, heard.say)
    assert not heard.found["failed"] and (heard.setup.engine / "manifest.json").is_file()


@pytest.mark.slow
def test_macs_match_the_published_model():
    """A step has 0.166 T multiply-accumulates, as counted by benchmarks/flops.py."""
    assert gpu_networks.macs_of(Setup())["expert_0"] == pytest.approx(0.1663e12, rel=1e-3)


# Tests of the program as a whole.


def test_nothing_is_measured_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu.main(["--cache", str(tmp_path), "-o", str(tmp_path / "out")]) == 0
    assert "no GPU that can be used here (no GPU cuda:0" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def scripted(monkeypatch: pytest.MonkeyPatch, **parts: dict[str, Any]) -> None:
    """Replace the sections by the given results."""
    found = {"machine": {"facts": FACTS}, **parts}

    def in_process(name: str, setup: Setup, deadline: float, heard: Any = None) -> dict[str, Any]:
        return gpu.empty() | found.get(name, {"absent": f"no {name}"})

    monkeypatch.setattr(gpu, "in_process", in_process)


def row(who: str, what: str, value: float, batch: int = 1, **more: Any) -> dict[str, Any]:
    return gpu_setup.Row(who, what, value, "ms", batch, **more).__dict__


@pytest.mark.parametrize("right", [True, False])
def test_results_are_written_to_a_page(tmp_path, capsys, monkeypatch, right):
    device = {
        "rows": [
            row("runtime over X", "step", 1.0, share=0.5, limit="matrix rate"),
            row("runtime over X", "step", 9.0, 16, share=0.61, limit="matrix rate"),
            row("runtime over X", "image of 20 steps", 44.0),
        ],
        "checks": [{"what": "a step", "error": 0.5, "tolerance": 0.1, "held": right}],
        "notes": ["four cases were not reached"],
    }
    scripted(monkeypatch, device=device)
    assert gpu.main(["--cache", str(tmp_path), "-o", str(tmp_path)]) == (0 if right else 1)
    text = (tmp_path / "gpu-nvidia-test-1.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert "| image of 20 steps | 50 ms | 44 ms (runtime over X) |" in text
    assert "| a step over its floor, batch 1 | 3 x | 2 x (runtime over X) |" in text
    assert "| share of the matrix rate, batch 16 | 50 % | 61 % (runtime over X) |" in text
    assert "| image of 200 steps | 300 ms | not measured |" in text
    assert ("NOT held: a step, error 5.0e-01" in text) is not right
    assert "- device: four cases" in text and "- tensorrt: absent: no tensorrt" in text
    assert json.loads((tmp_path / "gpu-nvidia-test-1.json").read_text())["device"]["rows"]


def test_results_of_a_section_that_runs_are_written(tmp_path):
    found = {"machine": gpu.empty() | {"facts": FACTS}}
    part = gpu.empty() | {"rows": [row("device", "tick", 1.0)]}
    gpu.save(tmp_path, "x", found, "device", part)
    assert "- device: failed: it was running when this was written" in (tmp_path / "gpu-x.md").read_text()
    assert json.loads((tmp_path / "gpu-x.json").read_text())["device"]["rows"] and "device" not in found
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-x.json", "gpu-x.md"}


def test_every_section_can_be_imported():
    for section in gpu.SECTIONS.values():
        assert callable(getattr(gpu.importlib.import_module(section.module), section.function))
    assert gpu_report.rows_of({"x": gpu.empty()})


# The sections for a short call.


@pytest.fixture
def small_ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The registry with small cases in place of the deployed ones, for which the GPU is simulated."""
    chosen = {"tile_gather": "uint8", "tile_blend": "odd", "image_pixels": "uint8"}
    found = {}
    for name, case in chosen.items():
        cases = tuple(c for c in OPS[name].cases if (c.name, c.dtype) == (case, "fp32"))
        found[name] = dataclasses.replace(OPS[name], deployed=cases or OPS[name].cases[:1])
    monkeypatch.setattr(gpu_cubins, "operator", found.__getitem__)
    return found


@pytest.fixture
def tensors_in_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the host are memory of the simulated GPU, at the addresses that they have."""

    def register(tensor: torch.Tensor, driver: SimulatedDriver) -> int:
        flat = tensor.detach().view(-1).view(torch.uint8).numpy()
        driver.blocks[tensor.data_ptr()] = flat
        return tensor.data_ptr()

    monkeypatch.setattr(gpu_cubins, "address_of", register)
    monkeypatch.setattr(gpu_cubins, "absent_unless_there", lambda *modules: None)
    monkeypatch.setattr(
        gpu_cubins, "seconds_each", lambda run, sync, _: gpu_setup.seconds_each(run, sync, 0.0)
    )


@pytest.mark.parametrize("wrong", [False, True])
def test_every_plan_of_an_index_is_checked_and_timed(
    heard: Heard, small_ops: dict[str, Any], tensors_in_the_gpu: None, tmp_path, monkeypatch, wrong: bool
):
    from cuda_simulation import RUN

    if wrong:
        monkeypatch.setitem(RUN, "image_pixels", lambda *arguments: None)
    write_kernels(tmp_path / "kernels", ops=list(small_ops.values()))
    monkeypatch.setattr(gpu_cubins.kernel_search, "SHIPPED", tmp_path / "none")
    setup = dataclasses.replace(heard.setup, kernels=tmp_path / "kernels")
    gpu_cubins.measure_cubins(setup, Report(heard.say, setup))
    checks = {check["what"].split()[1]: check["held"] for check in heard.found["checks"]}
    assert checks == {"tile_gather": True, "tile_blend": True, "image_pixels": not wrong}
    assert {row["who"] for row in heard.found["rows"]} == {f"cubin {n}" for n, held in checks.items() if held}
    assert not heard.found["notes"]


def test_prebuilt_kernels_are_not_compiled(heard: Heard, tmp_path):
    setup = dataclasses.replace(heard.setup, kernels=tmp_path)
    gpu.run_section("compile", setup, heard.say)
    assert heard.found["absent"].startswith("not needed: the kernels are those of")


def test_kernels_are_compiled_anew_after_a_call_that_was_ended(heard: Heard, tmp_path, monkeypatch):
    there = list[bool]()
    monkeypatch.setattr(
        "moesr.kernels.build.build", lambda folder, *rest, **more: there.append(folder.exists())
    )
    monkeypatch.setattr(gpu_cubins, "absent_unless_there", lambda *modules: None)
    monkeypatch.setattr(cuda_driver, "open_device", lambda index: None)
    monkeypatch.setattr(cuda_driver, "device_capability", lambda device: 90)
    setup = dataclasses.replace(heard.setup, cache=tmp_path)
    (setup.compiled / "sm_90").mkdir(parents=True)
    gpu.run_section("compile", setup, heard.say)
    assert there == [False] and heard.found["rows"] and not heard.found["failed"]


@pytest.mark.parametrize("failing", [False, True])
def test_captures_under_disturbance(heard: Heard, monkeypatch: pytest.MonkeyPatch, failing: bool):
    monkeypatch.setattr(
        gpu_stress, "SECONDS", 0.5
    )  # in one round the other thread may hold the lock throughout
    monkeypatch.setattr(gpu_stress, "absent_unless_there", lambda *modules: None)
    monkeypatch.setattr(gpu_stress.kernel_search, "SHIPPED", heard.setup.engine / "kernels")
    if failing:

        def driver(index: int) -> SimulatedDriver:
            made = SimulatedDriver()
            made.failing_captures.extend(["end"])
            return made

        monkeypatch.setattr(cuda_driver, "CudaDriver", driver)
    gpu_stress.measure_captures(heard.setup, heard.report)
    failed = {row["who"]: row["value"] > 0 for row in heard.found["rows"] if row["what"] == "failed captures"}
    assert failed == dict.fromkeys(("captures with the lock", "captures without the lock"), failing)
    held = [check["held"] for check in heard.found["checks"]]
    assert held == [True, not failing, True]


@pytest.mark.parametrize("name", gpu_alternatives.COMPARED)
def test_alternatives_are_checked_and_timed(heard: Heard, monkeypatch: pytest.MonkeyPatch, name: str):
    """The tilings of attention in Triton's interpreter, and PyTorch's form of each operator."""
    pytest.importorskip("triton")
    if name != "attention":
        monkeypatch.setattr(gpu_alternatives, "tilings", lambda op, case: {})  # slow in the interpreter
    monkeypatch.setattr(gpu_alternatives, "absent_unless_there", lambda *modules: None)
    monkeypatch.setattr(gpu_alternatives, "seconds_each", lambda run, sync, _: (run(), 1e-3)[1])
    op = OPS[name]
    case = min((c for c in op.cases if c.dtype == "fp16"), key=lambda c: op.cost(c.shape, c.dtype).flops)
    gpu_alternatives.measure_case(op, case, heard.setup, heard.report)
    names = [row["who"] for row in heard.found["rows"]]
    assert names[-1] == f"{name}, PyTorch" and not heard.found["notes"]
    if name == "attention":
        assert held(heard) and names[0].startswith("attention, tiling of sm_80")


def test_an_alternative_that_pytorch_cannot_compute_is_noted(heard: Heard, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")

    def fails(**given: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_alternatives, "tilings", lambda op, case: {})
    op = dataclasses.replace(OPS["attention"], baseline=fails)
    case = next(c for c in op.cases if c.dtype == "fp16" and not c.slow)
    gpu_alternatives.measure_case(op, case, heard.setup, heard.report)
    assert not heard.found["rows"] and "PyTorch: RuntimeError: no kernel image" in heard.found["notes"][0]


def test_two_calls_make_one_page(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, device={"rows": [row("device", "tick", 1.0)]}, pytorch={"notes": ["second"]})
    options = ["--cache", str(tmp_path), "-o", str(tmp_path)]
    assert gpu.main([*options, "--call", "1"]) == 0 == gpu.main([*options, "--call", "2"])
    found = json.loads((tmp_path / "gpu-nvidia-test-1.json").read_text())
    assert found["device"]["rows"] and found["pytorch"]["notes"] == ["second"]
    for seconds, sections in gpu.CALLS.values():
        assert set(sections) <= gpu.SECTIONS.keys() and seconds in (200, 400)


def test_rehearsal_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAM", Path(rehearse_gpu.__file__))
    found = {name: gpu.empty() for name in ("machine", *gpu.CALLS[1][1])}
    for faults, name in (("", "machine"), ("crash:machine", "limits")):
        monkeypatch.setenv(rehearse_gpu.FAULTS, faults)
        found[name] = gpu.in_process("machine", Setup(cache=tmp_path), time.monotonic() + 100)
    assert found["machine"]["facts"]["gpu"] == rehearse_gpu.NAME and not found["machine"]["failed"]
    text = rehearse_gpu.page(found, [1], ["--crash", "limits"])
    assert "| 1 (200 s) | machine | 15 | " in text and "| 0 of 0 | 0 | done |" in text
    assert "| its process ended with code -11 (a signal) |" in text


def test_travelling_tree_is_small(capsys):
    assert travel.main(["--limit", "60"]) == 0
    assert capsys.readouterr().out.split() == ["runtime/demo_engines", "training/demo_checkpoints"]
    assert travel.leave_out({"docs/a": 5, "runtime/b": 7}, 7) == (["docs"], 7)
    assert travel.leave_out({"runtime/b": 7}, 6)[1] == 7
