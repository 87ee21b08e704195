"""moesr-export --tensorrt builds plans, cuts the decoder into parts and compiles kernels without a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from graphs import write_checkpoint

from moesr.export import cli, parity, tensorrt
from moesr.kernels import plan
from moesr.runtime.backends.tensorrt import library as tensorrt_library
from moesr.runtime.backends.tensorrt.library import Library
from moesr.runtime.engine.manifest_file import read_manifest

TILE = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def library(monkeypatch):
    """A replacement for TensorRT that builds plans for two GPUs; the plans that it built are listed."""
    module = SimpleNamespace(ComputeCapability=SimpleNamespace(SM86="SM86", SM89="SM89"))
    library = Library("tensorrt_rtx", "9.9", module, None)
    for place in (tensorrt, tensorrt_library):
        monkeypatch.setattr(place, "load", lambda flavour=None: library)
    built = []

    def build_plan(library, path, capability, max_batch, **options) -> bytes:
        onnx.load(path)
        built.append((path.name, capability, max_batch))
        assert options["timing_cache"].name == f"tensorrt_rtx-9.9-sm{capability}.timings"
        options["on_progress"](1.0)
        return f"plan of {path.name} for {capability}".encode()

    monkeypatch.setattr(tensorrt, "build_plan", build_plan)
    monkeypatch.setattr(plan, "check_compiler", lambda: None)
    return built


def export(checkpoint: Path, directory: Path, *flags: str) -> int:
    return cli.main([str(checkpoint), "-o", str(directory), "--tile", str(TILE), "--tensorrt", *flags])


def test_plans_are_built_for_every_graph_and_part(checkpoint, tmp_path, library, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(tensorrt, "build_kernels", lambda d, m, c: compiled.append(c) or d / "kernels")
    assert export(checkpoint, tmp_path / "e", "--fp16", "--capability", "8.6", "8.9") == 0
    manifest = read_manifest(tmp_path / "e")
    decoder = manifest.graphs["decoder"].variants["parts"]
    files = [f.file for f in decoder.data if f.file.endswith(".onnx")]
    assert len(files) > 5 and decoder.precision == "fp16"
    assert decoder.parity and decoder.parity.relative_l2 < decoder.parity.threshold
    wanted = {"expert_0.gpu.onnx", "expert_1.gpu.onnx", *files}
    assert set(library) == {(file, capability, 4) for file in wanted for capability in (86, 89)}
    assert len(list((tmp_path / "e" / "tensorrt").iterdir())) == len(set(library))
    assert compiled == [[86, 89]]
    assert "plans in" in capsys.readouterr().out
    for file in decoder.files:  # the manifest holds the hash of every file
        assert file in manifest.files


def test_existing_plans_are_kept(checkpoint, tmp_path, library, monkeypatch):
    monkeypatch.setattr(tensorrt, "build_kernels", lambda directory, manifest, targets: directory)
    assert export(checkpoint, tmp_path / "e", "--no-kernels", "--capability", "8.9", "--quiet") == 0
    before = len(library)
    tensorrt.build_plans(tmp_path / "e", read_manifest(tmp_path / "e"), [89])
    assert len(library) == before == 3
    assert "parts" not in read_manifest(tmp_path / "e").graphs["decoder"].variants


def test_unsupported_gpus_are_refused(checkpoint, tmp_path, library, capsys):
    assert export(checkpoint, tmp_path / "e", "--capability", "9.0") == 3
    assert "builds for compute capability 8.6, 8.9, not for 9.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export(checkpoint, tmp_path / "e", "--capability", "ninety")
    assert "'ninety', expected two numbers such as 8.9" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_missing_compiler_is_reported_before_the_export(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert export(checkpoint, tmp_path / "e", "--capability", "8.9") == 2
    assert "pip install 'moesr[kernels]'" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_kernels_of_the_decoder_and_of_the_sampling_loop_are_compiled(
    checkpoint, tmp_path, library, monkeypatch
):
    rows = {}
    monkeypatch.setattr(
        "moesr.kernels.build.build", lambda d, a, ops: rows.update({op.name: op for op in ops})
    )
    assert export(checkpoint, tmp_path / "e", "--fp16", "--capability", "8.9", "--quiet") == 0
    loop = {"tile_gather", "tile_blend", "sampler_step"}
    assert rows.keys() == {"aff_filter", "attention", *loop}
    shapes = {(case.shape["height"], case.dtype) for case in rows["aff_filter"].deployed}
    assert shapes == {(TILE, "fp16"), (TILE // 2, "fp16"), (TILE // 4, "fp16")}
    assert {case.dtype for case in rows["tile_gather"].deployed} == {"fp32"}


@pytest.mark.parametrize("stage", ["build_plans", "build_kernels"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_interrupt_while_plans_are_built_leaves_a_complete_engine(
    checkpoint, tmp_path, library, monkeypatch, capsys, stage, existing
):
    def interrupt(*given, **options):
        raise KeyboardInterrupt

    if existing:
        assert cli.main([str(checkpoint), "-o", str(tmp_path / "e"), "--tile", str(TILE), "--quiet"]) == 0
    monkeypatch.setattr(tensorrt, stage, interrupt)
    assert export(checkpoint, tmp_path / "e", "--capability", "8.9", "--quiet", "--force") == 130
    said = capsys.readouterr().err
    assert "nothing was written" not in said and "e is complete, but its TensorRT plans" in said
    assert "gpu" in read_manifest(tmp_path / "e").graphs["decoder"].variants


def test_interrupt_before_publication_leaves_the_existing_engine(
    checkpoint, tmp_path, library, monkeypatch, capsys
):
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "e"), "--tile", str(TILE), "--quiet"]) == 0
    before = (tmp_path / "e" / "manifest.json").read_bytes()

    def interrupt(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "prove", interrupt)
    assert export(checkpoint, tmp_path / "e", "--capability", "8.9", "--quiet", "--force") == 130
    assert "nothing was written" in capsys.readouterr().err
    assert (tmp_path / "e" / "manifest.json").read_bytes() == before


def test_option_compiles_kernels_for_inverted_residuals(checkpoint, tmp_path, library, monkeypatch):
    monkeypatch.setattr(tensorrt, "build_kernels", lambda directory, manifest, targets: directory)
    flags = "--fp16", "--capability", "8.9", "--quiet", "--residuals", "kernels"
    assert export(checkpoint, tmp_path / "e", *flags) == 0
    steps = tensorrt.kernel_steps(tmp_path / "e", read_manifest(tmp_path / "e"))
    assert {step.op for step in steps} == {"aff_filter", "attention", "inverted_residual"}
