"""Exports with shallow graphs: their results, shared weights, and refused options."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import relative_l2
from graphs import TINY, expert_inputs, random_expert, run, write_checkpoint

from moesr.export import cli
from moesr.export.external_weights import ALIGNMENT, SMALL_BYTES
from moesr.export.graphs.expert import expert_graph, shallow_graph, shallow_parts
from moesr.export.lowering import Precision
from moesr.export.options import ExportOptions
from moesr.export.package import export_engine
from moesr.export.reuse import ShallowExpert, check_blocks, shallow_inputs
from moesr.runtime import Upscaler
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError, UsageError
from moesr.training.checkpoint import load_checkpoint
from moesr.training.config import StableSRConfig

PX, SIDE = 64, 16
ROLES = ("expert_0", "expert_1")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    checkpoint = load_checkpoint(write_checkpoint(directory / "checkpoint"))
    options = ExportOptions(tile_px=PX, reuse=2, target="both", precision="fp16")
    export_engine(checkpoint, directory / "engine", options)
    return directory / "engine"


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_shallow_step_equals_the_full_step_on_its_own_features(blocks: int):
    network = random_expert(0)
    inputs = expert_inputs(2, SIDE)
    whole = run(expert_graph(network, SIDE), inputs)
    given = shallow_inputs(network, inputs, blocks)
    shallow = shallow_graph(network, SIDE, blocks=blocks)
    assert relative_l2(run(shallow, given), whole) < 1e-5
    with torch.inference_mode():
        plain = ShallowExpert(network, blocks)(*map(torch.from_numpy, given.values()))
    assert relative_l2(plain.numpy(), whole) < 1e-5
    full = expert_graph(network, SIDE, blocks=blocks)
    session = ort.InferenceSession(full.to_bytes())
    eps, deep = session.run(["eps", "deep"], inputs)
    np.testing.assert_array_equal(eps, whole)
    assert relative_l2(np.asarray(deep), given["deep"]) < 1e-5
    assert shallow.macs < full.macs


def test_shallow_step_depends_on_the_features():
    network, inputs = random_expert(0), expert_inputs(2, SIDE)
    given = shallow_inputs(network, inputs, 2)
    shallow = shallow_graph(network, SIDE, blocks=2)
    other = run(shallow, given | {"deep": given["deep"] * 0.5})
    assert relative_l2(other, run(shallow, given)) > 1e-2


def test_manifest_describes_the_shallow_graphs(engine: Path):
    manifest = read_manifest(engine)
    assert [e.shallow for e in manifest.experts] == ["shallow_0", "shallow_1"]
    assert manifest.deep and manifest.deep.dims == ("B", 16, SIDE, SIDE)
    for k in range(2):
        full, shallow = manifest.graphs[f"expert_{k}"], manifest.graphs[f"shallow_{k}"]
        network = random_expert(k)
        assert 0 < shallow.macs < full.macs
        parts = [network.time_embed, *shallow_parts(network, 2)]
        assert shallow.params == sum(p.numel() for part in parts for p in part.parameters()) < full.params
        for one, other in zip(full.arrangements, shallow.arrangements, strict=True):
            assert one.data == other.data and len(one.data) == 1 and one.parity and other.parity


def test_shared_weights_are_stored_once(engine: Path):
    for role in ROLES:
        weights = (engine / f"{role}.weights").stat().st_size
        models = [onnx.load(engine / f"{r}.onnx") for r in (role, role.replace("expert", "shallow"))]
        large = [{t.raw_data for t in m.graph.initializer if len(t.raw_data) >= SMALL_BYTES} for m in models]
        assert weights == sum(-(-len(raw) // ALIGNMENT) * ALIGNMENT for raw in large[0] | large[1])
        assert len(large[0] & large[1]) > len(large[1]) / 2
        content = (engine / f"{role}.weights").read_bytes()
        for model in models:  # the hash of a graph covers its weights
            told = {p.key: p.value for p in model.metadata_props}
            assert told == {f"{role}.weights": sha256(content).hexdigest()}
        small = [engine / f"{r}.onnx" for r in (role, role.replace("expert", "shallow"))]
        assert sum(path.stat().st_size for path in small) < weights


def test_runtime_runs_full_and_shallow_steps(engine: Path):
    lr = np.random.default_rng(1).integers(0, 256, (16, 21, 3), np.uint8)
    with Upscaler(engine, backend="onnxruntime", threads=1) as up:
        one, two = up(lr, steps=4, color_fix="none"), up(lr, steps=4, reuse=2, color_fix="none")
        assert set(up._worker._residency.loaded) > {"shallow_0", "shallow_1"}
    assert one.shape == two.shape == (64, 84, 3) and np.any(one != two)


def test_damaged_weight_file_is_refused(engine: Path, tmp_path: Path):
    copy = Path(shutil.copytree(engine, tmp_path / "engine"))
    data = bytearray((copy / "expert_0.weights").read_bytes())
    data[100] ^= 1
    (copy / "expert_0.weights").write_bytes(data)
    with pytest.raises(EngineError, match=r"expert_0\.weights: damaged"):
        read_manifest(copy)


def test_number_of_blocks_out_of_range_is_refused():
    check_blocks(TINY, cli.parser().parse_args(["--reuse"]).reuse)
    check_blocks(TINY, 7)
    for asked in (-1, 0, 8):
        with pytest.raises(UsageError, match=rf"--reuse {asked}: expected 1 to 7 of the network's 8"):
            check_blocks(TINY, asked)
    with pytest.raises(UsageError, match="has no shallow graphs"):
        check_blocks(StableSRConfig(), 1)


def test_expert_without_reuse_has_one_output():
    assert expert_graph(random_expert(0), SIDE).boundary.outputs[1:] == ()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_shallow_graphs_in_other_precisions(tmp_path: Path, precision: Precision):
    """In int8 both graphs are calibrated, the shallow one on features of the previous step."""
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "checkpoint"))
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 24, 24, 3), np.uint8)
    photographs = [image.repeat(4, axis=0).repeat(4, axis=1) for image in blocks]
    options = ExportOptions(tile_px=PX, reuse=1, precision=precision)
    manifest = export_engine(checkpoint, tmp_path / "engine", options, photographs=photographs)
    assert manifest.graphs["shallow_0"].precision == precision
    assert (manifest.graphs["shallow_0"].calibration is not None) == (precision == "int8")
    with Upscaler(tmp_path / "engine", backend="onnxruntime", threads=1) as up:
        assert up(blocks[0], steps=4, reuse=2).shape == (96, 96, 3)
