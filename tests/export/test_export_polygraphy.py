"""moesr-export --polygraphy writes inputs and a script with which Polygraphy runs every graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import write_checkpoint

from moesr.export import cli
from moesr.export.options import ExportOptions
from moesr.export.package import export_engine
from moesr.export.polygraphy_data import loader_name
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.training.checkpoint import load_checkpoint

TILE = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("engine") / "tiny"
    options = ExportOptions(tile_px=TILE, target="both", precision="fp16", kernels=True, polygraphy=True)
    export_engine(load_checkpoint(checkpoint), directory, options)
    return directory


def graph_files(engine: Path) -> list[Path]:
    return sorted(engine.glob("*.onnx"))


def test_every_graph_and_part_has_inputs(engine):
    files = graph_files(engine)
    assert any(".part_" in path.name for path in files) and any(".gpu." in path.name for path in files)
    assert {path.stem for path in (engine / "polygraphy").glob("*.npz")} == {path.stem for path in files}
    for path in files:
        declared = {i.name: i.type.tensor_type for i in onnx.load(path, load_external_data=False).graph.input}
        with np.load(engine / "polygraphy" / f"{path.stem}.npz") as arrays:
            assert set(arrays.files) == set(declared)
            for name, array in arrays.items():
                kind = onnx.helper.tensor_dtype_to_np_dtype(declared[name].elem_type)
                assert array.dtype == kind and array.ndim == len(declared[name].shape.dim)


def test_runtime_reads_an_engine_with_polygraphy_files(engine):
    assert not any("polygraphy" in file.file for file in read_manifest(engine).files)


def test_no_files_without_the_option(checkpoint, tmp_path):
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "e"), "--tile", str(TILE), "--quiet"]) == 0
    assert not (tmp_path / "e" / "polygraphy").exists()


def test_command_line_option(checkpoint, tmp_path):
    flags = ["--tile", str(TILE), "--quiet", "--polygraphy"]
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "e"), *flags]) == 0
    text = (tmp_path / "e" / "polygraphy" / "data_loader.py").read_text()
    assert "def decoder():" in text and "def expert_0():" in text


@pytest.mark.parametrize("graph", ["expert_0", "decoder.gpu", "decoder.part_0"])
def test_polygraphy_runs_a_graph_on_onnx_runtime(engine, graph):
    """This is the part of docs/gpu.md's `polygraphy run --onnxrt --trt` that needs no GPU."""
    pytest.importorskip("polygraphy")
    script = f"{engine / 'polygraphy' / 'data_loader.py'}:{loader_name(graph)}"
    command = ["run", str(engine / f"{graph}.onnx"), "--onnxrt", "--data-loader-script", script, "--validate"]
    program = "import sys; from polygraphy.tools import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout
