"""An export writes a complete engine directory or none, and the manifest describes its contents."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import relative_l2
from graphs import (
    PLAIN_LDM,
    TINY,
    decoder_inputs,
    expert_inputs,
    random_decoder,
    random_expert,
    run,
    write_checkpoint,
)

from moesr.export import cli, package, parity
from moesr.export.graphs.builder import OPSET
from moesr.export.graphs.expert import expert_graph
from moesr.export.lowering import CPU, TARGETS, lowering
from moesr.export.options import ExportOptions
from moesr.runtime import Upscaler
from moesr.runtime.cli import doctor
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.training.networks import DenoisingUNet

ENGINES = {
    "fp32": [],
    "fp16": ["--fp16"],
    "stored": ["--store", "fp16"],
    "both": ["--target", "both", "--fp16"],
}
TILE = 32
LIMITS = {"fp32": 2e-5, "fp16": 3e-3, "stored": 3e-3, "both": 2e-5}
ROLES = {"expert_0", "expert_1", "decoder"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, checkpoint, tmp_path_factory) -> tuple[Path, Manifest, str]:
    directory = tmp_path_factory.mktemp("engine") / request.param
    flags = ["--tile", str(TILE), "--quiet", *ENGINES[request.param]]
    assert cli.main([str(checkpoint), "-o", str(directory), *flags]) == 0
    return directory, read_manifest(directory), request.param


def test_graphs_match_the_networks_of_the_checkpoint(engine):
    """The inputs differ from those of the export's own parity check."""
    directory, manifest, kind = engine
    for k in range(2):
        path, inputs = directory / manifest.graphs[f"expert_{k}"].file, expert_inputs(2, TILE // 4)
        assert relative_l2(run(path, inputs), parity.network_output(random_expert(k), inputs)) < LIMITS[kind]
    path, inputs = directory / manifest.graphs["decoder"].file, decoder_inputs(random_decoder(), [0.3], TILE)
    assert relative_l2(run(path, inputs), parity.network_output(random_decoder(), inputs)) < LIMITS[kind]


def test_manifest_describes_the_engine(engine):
    _, manifest, kind = engine
    assert (manifest.name, manifest.scale, manifest.tile, manifest.latent_tile) == (
        "tiny",
        4,
        TILE,
        TILE // 4,
    )
    assert manifest.expert_ranges == TINY.expert_ranges
    assert manifest.graphs.keys() == ROLES
    assert manifest.precision == ("fp16" if kind == "fp16" else "fp32")
    own = next(
        iter(
            ExportOptions(
                precision="fp16" if kind == "fp16" else "fp32", store="fp16" if kind == "stored" else "fp32"
            )
            .lowerings()
            .values()
        )
    )
    for graph in manifest.graphs.values():
        assert graph.parity and 0 < graph.parity.relative_l2 < graph.parity.threshold == parity.threshold(own)
        assert graph.macs > 1e6
    assert manifest.versions["opset"] == str(OPSET)
    assert manifest.graphs["expert_0"].params == sum(p.numel() for p in DenoisingUNet(TINY.unet).parameters())


def test_manifest_lists_the_inputs_and_outputs_of_each_file(engine):
    directory, manifest, _ = engine
    for graph in manifest.graphs.values():
        for arrangement in graph.arrangements:
            file = onnx.load(directory / arrangement.file).graph
            for specs, values in ((graph.inputs, file.input), (graph.outputs, file.output)):
                dims = [
                    tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values
                ]
                assert [(s.name, s.dims) for s in specs] == list(
                    zip((v.name for v in values), dims, strict=True)
                )


def test_runtime_runs_the_engine(engine):
    directory, _, _ = engine
    image = np.random.default_rng(5).integers(0, 256, (12, 10, 3), np.uint8)
    with Upscaler(directory, device="cpu") as up:
        assert up(image, steps=2, seed=0).shape == (48, 40, 3)


def test_directory_holds_only_the_files_of_the_manifest(engine):
    directory, manifest, _ = engine
    listed = {file.file: file.sha256 for file in manifest.files}
    assert {path.name for path in directory.iterdir()} == {"manifest.json", *listed}
    for name, sha256 in listed.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == sha256


def test_same_checkpoint_gives_the_same_bytes(engine, checkpoint, tmp_path):
    _, manifest, kind = engine
    flags = ["--tile", str(TILE), "--quiet", *ENGINES[kind]]
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "again"), *flags]) == 0
    assert read_manifest(tmp_path / "again").files == manifest.files


@pytest.fixture(scope="module")
def both(checkpoint, tmp_path_factory) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("engine") / "both"
    assert cli.main([str(checkpoint), "-o", str(directory), "--tile", "32", *ENGINES["both"]]) == 0
    return directory, read_manifest(directory)


def test_target_both_adds_gpu_variants(both):
    directory, manifest = both
    for role, graph in manifest.graphs.items():
        assert (graph.file, graph.precision) == (f"{role}.onnx", "fp32")
        assert {t: (a.file, a.precision) for t, a in graph.variants.items()} == {
            "gpu": (f"{role}.gpu.onnx", "fp16")
        }
    inputs = decoder_inputs(random_decoder(), [1.0, 0.5], 32)
    got = run(directory / "decoder.gpu.onnx", inputs)
    assert 1e-5 < relative_l2(got, parity.network_output(random_decoder(), inputs)) < LIMITS["fp16"]


def test_every_file_has_a_parity_result(both):
    _, manifest = both
    for graph in manifest.graphs.values():
        own, variant = graph.parity, graph.variants["gpu"].parity
        assert own and variant and own.relative_l2 < 1e-4 < variant.relative_l2 < variant.threshold
        assert own.threshold < variant.threshold


def test_doctor_shows_the_parity_of_every_file(both, capsys):
    assert doctor.main(["--engine", str(both[0]), "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("parity decoder ")]
    assert len(lines) == 2 and lines[0].endswith("within 1e-04")
    assert lines[1].endswith("within 1e-02 (gpu, fp16)")


def test_manifest_states_the_storage_type_of_weights(engine):
    _, manifest, kind = engine
    stored = {graph.stored for graph in manifest.graphs.values()}
    assert stored == ({"fp16"} if kind == "stored" else {None})


def test_parity_of_variants_is_checked(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(parity.THRESHOLDS, ("fp16", "fp16"), 0.0)
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "e"), "--tile", "32", *ENGINES["both"]]) == 3
    assert "expert_0.gpu.onnx: relative L2 error" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_identical_variants_are_left_out(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "gpu", CPU)
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "e"), "--tile", "32", "--target", "both"]) == 0
    assert not any(graph.variants for graph in read_manifest(tmp_path / "e").graphs.values())
    assert {p.name for p in (tmp_path / "e").iterdir()} == {"manifest.json", *(f"{r}.onnx" for r in ROLES)}


def test_engine_for_a_gpu_only(checkpoint, tmp_path):
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "e"), "--tile", "32", "--target", "gpu"]) == 0
    graph = read_manifest(tmp_path / "e").graphs["decoder"]
    assert (graph.file, graph.precision, graph.variants) == ("decoder.onnx", "fp32", {})
    with torch.inference_mode():
        data = package.decoder_graph(random_decoder(), 8, lowering("gpu")).to_bytes()
    assert hashlib.sha256(data).hexdigest() == graph.sha256


def test_half_precision_storage_halves_the_size(checkpoint, tmp_path, capsys):
    sizes = {}
    for store in ("fp32", "fp16"):
        directory = tmp_path / store
        arguments = ["-o", str(directory), "--tile", "32", "--store", store]
        assert cli.main([str(checkpoint), *arguments]) == 0
        sizes[store] = sum(path.stat().st_size for path in directory.glob("*.onnx"))
        assert f"{sizes[store] / 1e6:.1f} MB" in capsys.readouterr().out
    assert sizes["fp16"] < 0.55 * sizes["fp32"]


def test_plain_ldm_is_exported(tmp_path):
    """The model has one expert without Space MoE, and its decoder takes the latent only."""
    source = write_checkpoint(tmp_path / "ldm", PLAIN_LDM)
    assert cli.main([str(source), "-o", str(tmp_path / "engine"), "--tile", "32"]) == 0
    decoder = read_manifest(tmp_path / "engine").graphs["decoder"]
    assert [spec.name for spec in decoder.inputs] == ["z"]
    network = random_decoder(PLAIN_LDM)
    inputs = decoder_inputs(network, [1.0, 1.0], side=32)
    got = run(tmp_path / "engine" / "decoder.onnx", inputs)
    assert relative_l2(got, parity.network_output(network, inputs)) < LIMITS["fp32"]


def test_defaults_of_the_model_are_used(tmp_path):
    """The manifest holds the model's prediction type, sampler and fidelity, and the runtime uses them."""
    given = {"prediction": "v", "sampler": "dpm++2m", "steps": 3, "fidelity": 0.25}
    model = dataclasses.replace(TINY, **given)
    checkpoint, engine = write_checkpoint(tmp_path / "tiny", model), tmp_path / "engine"
    assert cli.main([str(checkpoint), "-o", str(engine), "--tile", "32", "--reuse", "--quiet"]) == 0
    manifest = read_manifest(engine)
    assert {name: getattr(manifest, name) for name in given} == given
    for role in ("expert_0", "shallow_0"):
        assert manifest.graphs[role].outputs[0].name == "v"
    lr = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    with Upscaler(engine, threads=1) as up:
        stated = up(lr, sampler="dpm++2m", steps=3, fidelity=0.25)
        np.testing.assert_array_equal(up(lr), stated)
        assert (up(lr, fidelity=1.0) != stated).any() and up(lr, reuse=2).shape == stated.shape


def test_default_output_and_default_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package.resources, "files", lambda name: tmp_path)
    assert cli.main(["--tile", "32"]) == 2
    assert "no demo checkpoint" in capsys.readouterr().err
    (tmp_path / "demo_checkpoints").mkdir()
    for number, arguments in ((4, []), (8, ["demo-x8", "-o", "other"])):
        (tmp_path / f"demo_checkpoints/demo-x{number}").symlink_to(checkpoint)
        assert cli.main([*arguments, "--tile", "32"]) == 0
    assert read_manifest(tmp_path / "tiny-fp32").name == read_manifest(tmp_path / "other").name == "tiny"
    assert cli.main(["--tile", "32", "--target", "both", "--fp16", "--force"]) == 0
    assert read_manifest(tmp_path / "tiny-fp32").graphs["decoder"].variants["gpu"].precision == "fp16"


@torch.inference_mode()
def test_parity_check_detects_a_wrong_weight(tmp_path):
    network, path = random_expert(0), tmp_path / "expert_0.onnx"
    path.write_bytes(expert_graph(network, 16).to_bytes())
    inputs = parity.expert_inputs(network, 16, (0, 1000))
    parity.prove(path, inputs, parity.network_output(network, inputs), CPU)
    network.get_parameter("middle_block.0.out_layers.3.bias").data[0] += 0.5
    with pytest.raises(parity.ParityError, match="nothing was published"):
        parity.prove(path, inputs, parity.network_output(network, inputs), CPU)


def test_parity_check_refuses_infinities_and_nans(tmp_path, monkeypatch):
    want = np.zeros((1, 3, 8, 8), np.float32)
    for got, network, says in ((np.nan, 0.0, "relative L2 error nan"), (0.0, np.nan, "train it again")):
        monkeypatch.setitem(parity.BACKENDS, "onnxruntime", lambda path, inputs, got=got: [want + got])
        with pytest.raises(parity.ParityError, match=says):
            parity.prove(tmp_path / "decoder.onnx", {}, want + np.float32(network), CPU)


@pytest.mark.parametrize(
    ("choices", "cure"),
    [
        (lowering("gpu", "fp16"), "without --fp16"),
        (
            lowering("cpu", "fp32", "fp16"),
            "fp32 stored as fp16; nothing was published; export with --store fp32",
        ),
    ],
)
def test_message_of_a_failed_parity_check_names_the_cure(choices, cure, tmp_path, monkeypatch):
    want = np.ones((1, 3, 8, 8), np.float32)
    monkeypatch.setitem(parity.BACKENDS, "onnxruntime", lambda path, inputs: [want * 1.1])
    with pytest.raises(parity.ParityError, match=cure):
        parity.prove(tmp_path / "decoder.onnx", {}, want, choices)
