"""One ONNX file gives the runtime's result for one tile, by standard operators and without further files."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import stablesr
import torch
from autoencoders import tiny_checkpoint
from conftest import relative_l2
from graphs import PLAIN_LDM, TINY, write_checkpoint
from graphs import run as graphs_run

from moesr.export import cli, parity
from moesr.export.graphs.builder import GraphBuilder
from moesr.export.lowering import lowering
from moesr.export.single import proof, write
from moesr.export.single.graph import single_graph
from moesr.export.single.image_nodes import enlarge
from moesr.export.single.networks import family_of
from moesr.runtime import Upscaler
from moesr.runtime.engine.locate import engine_directory
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.images.resize import imresize
from moesr.runtime.loop import processing
from moesr.runtime.sampling import noise
from moesr.training.checkpoint import load_checkpoint

TILE = 32
SEED, FIDELITY = "7", "0.25"
MODELS = {
    "moe-sr": (TINY, ["--sampler", "dpm++2m", "--steps", "3"]),
    "noise": (PLAIN_LDM, ["--sampler", "ddpm", "--steps", "2", "--color-fix", "wavelet", "--target", "cpu"]),
    "v": (dataclasses.replace(TINY, prediction="v"), ["--sampler", "ddim", "--steps", "2"]),
    "x8": (dataclasses.replace(TINY, scale=8), ["--sampler", "ddpm", "--steps", "1", "--color-fix", "none"]),
}


@pytest.fixture
def planes(monkeypatch) -> list[np.ndarray]:
    """Collect the planes of the runtime's results in [-1, 1] before they are rounded to levels."""
    found: list[np.ndarray] = []
    rounded = processing.to_integers
    monkeypatch.setattr(processing, "to_integers", lambda v, top: found.append(v.copy()) or rounded(v, top))
    return found


def export(checkpoint: Path, path: Path, *flags: str) -> Path:
    """Write one file and return its path."""
    arguments = ["--single", "-o", str(path), "--tile", str(TILE), "--quiet", *flags]
    assert cli.main([str(checkpoint), *arguments]) == 0
    return path


def run(path: Path, image: np.ndarray) -> np.ndarray:
    """Run a file with plain ONNX Runtime on a uint8 image; returns [3, H, W] in [0, 1]."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert [(v.name, v.type) for v in (given, made)] == [
        ("input", "tensor(float)"),
        ("output", "tensor(float)"),
    ]
    assert (given.shape, made.shape[:2]) == ([1, 3, *image.shape[:2]], [1, 3])
    return session.run(None, {"input": np.float32(image.transpose(2, 0, 1)[None] / 255.0)})[0][0]


def facts(path: Path) -> dict[str, str]:
    """Return the metadata of a file without the common prefix of the keys."""
    return {p.key.removeprefix("moesr."): p.value for p in onnx.load(path).metadata_props}


def check(path: Path, engine: Path | str, planes: list[np.ndarray], bound: float = 1e-4) -> None:
    """Compare a file with an engine of the same tile on one tile, with the settings that the file states."""
    stated = facts(path)
    side = int(stated["input_px"])
    image = proof.seeded_image(side, side)
    settings = {"sampler": stated["sampler"], "color_fix": stated["color_fix"]}
    numbers = {name: int(stated[name]) for name in ("steps", "seed")}
    with Upscaler(engine, device="cpu", threads=1) as up:
        result = up(image, **settings, **numbers, fidelity=float(stated["fidelity"]))
    got, want = run(path, image), np.clip(np.stack(planes) / 2 + 0.5, 0, 1)
    assert relative_l2(got, want) < bound
    if bound < 1e-3:
        assert np.abs(np.rint(got.transpose(1, 2, 0) * 255.0) - result).max() <= 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory) -> Path:
    flags = ["--seed", SEED, "--fidelity", FIDELITY, *MODELS["moe-sr"][1]]
    return export(tiny, tmp_path_factory.mktemp("single") / "tiny.onnx", *flags)


@pytest.mark.slow
def test_file_equals_the_runtime_on_one_tile(single, tiny, planes, tmp_path):
    assert cli.main([str(tiny), "-o", str(tmp_path / "engine"), "--tile", str(TILE), "--quiet"]) == 0
    check(single, tmp_path / "engine", planes)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS)[1:])
def test_every_kind_of_model_equals_the_runtime(name, planes, tmp_path):
    model, flags = MODELS[name]
    if model.decoder.fusion_level is not None:
        flags = [*flags, "--fidelity", FIDELITY]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "engine"), "--tile", str(TILE), "--quiet"]) == 0
    check(export(checkpoint, tmp_path / "single.onnx", *flags), tmp_path / "engine", planes)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [[], ["--guidance", "3"]], ids=["plain", "guided"])
def test_stablesr_equals_the_runtime(guidance, planes, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TILE", 64)
    checkpoint = stablesr.write_checkpoint(tmp_path / "checkpoint", stablesr.TINY)
    flags = [str(checkpoint), "-o", str(tmp_path / "engine"), "--tile", "64", "--quiet", *guidance]
    assert cli.main(flags) == 0
    path = export(checkpoint, tmp_path / "single.onnx", "--steps", "2", "--color-fix", "wavelet", *guidance)
    check(path, tmp_path / "engine", planes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo-x4", "demo-x8"])
def test_bundled_models_equal_the_runtime(name, planes, tmp_path, monkeypatch):
    tile = read_manifest(engine_directory(name)).tile
    monkeypatch.setattr(sys.modules[__name__], "TILE", tile)
    check(export(Path(name), tmp_path / f"{name}.onnx", "--steps", "4"), name, planes)


def test_tools_can_infer_every_shape(single):
    """chaiNNer infers shapes strictly and from them the scale; vs-mlrt also reads them from the file."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load(single), strict_mode=True)
    (output,) = inferred.graph.output
    assert [d.dim_value for d in output.type.tensor_type.shape.dim] == [1, 3, TILE, TILE]
    known = {value.name for value in inferred.graph.value_info} | {output.name}
    assert known >= {name for node in inferred.graph.node for name in node.output}
    assert {node.domain for node in inferred.graph.node} == {""}


def test_weights_are_stored_once(single, tiny):
    """The steps share the weights, so the file is no larger than the networks that it uses."""
    model = onnx.load(single)
    arrays = [t for t in model.graph.initializer if len(t.raw_data) > 1024]
    assert len({(t.data_type, tuple(t.dims), t.raw_data) for t in arrays}) == len(arrays)
    assert single.stat().st_size < 1.1 * sum(p.stat().st_size for p in tiny.glob("*.safetensors"))
    uses = Counter(name for node in model.graph.node for name in node.input)
    assert max(uses[t.name] for t in arrays if len(t.dims) == 4) >= 2


def test_metadata_describes_the_file(single, tiny):
    assert facts(single) == {
        "name": "tiny",
        "scale": "4",
        "input_px": str(TILE // 4),
        "steps": "3",
        "sampler": "dpm++2m",
        "seed": SEED,
        "fidelity": FIDELITY,
        "color_fix": "adain",
        "precision": "fp32",
        "opset": "20",
        "checkpoint_sha256": load_checkpoint(tiny).sha256(),
        "version": metadata.version("moesr"),
    }


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--single"], "give their number, such as --steps 4"),
        (["--steps", "4"], "--steps belongs to --single"),
        (["--color-fix", "none"], "--color-fix belongs to --single"),
        (["--single", "--steps", "0"], "steps"),
        (["--single", "--steps", "4", "--int8"], "exclude each other"),
        (["--single", "--steps", "4", "--bf16"], "exclude each other"),
        (["--single", "--steps", "4", "--tensorrt"], "exclude each other"),
        (["--single", "--steps", "4", "--no-kernels"], "exclude each other"),
        (["--single", "--steps", "4", "--residuals", "kernels"], "exclude each other"),
        (["--single", "--steps", "4", "--reuse"], "exclude each other"),
        (["--single", "--steps", "4", "--polygraphy"], "exclude each other"),
        (["--single", "--steps", "4", "--calibrate", "."], "exclude each other"),
        (["--single", "--steps", "4", "--capability", "8.9"], "exclude each other"),
        (["--single", "--steps", "4", "--push", "a/b"], "exclude each other"),
        (["--single", "--steps", "4", "--target", "both"], "--target cpu or --target gpu"),
        (["--dynamic"], "--dynamic belongs to --single"),
        (["--single", "--steps", "4", "--dynamic", "--target", "cpu"], "--dynamic needs plain operators"),
        (["--single", "--steps", "4", "--fidelity", "2"], "fidelity"),
        (["--single", "--steps", "4", "--seed", "-1"], "seed"),
        (["--single", "--steps", "4", "--tile", "33"], "--tile 33"),
        (["--single", "--steps", "4", "--prompt", "x"], "no text encoder"),
        (["--single", "--steps", "4", "-o", "engine"], "a name that ends in .onnx"),
    ],
)
def test_wrong_options_are_refused(flags, says, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(tiny), *flags]) == 2
    assert says in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scale", "says"), [(2, "a multiple of the decoder's factor"), (12, "a multiple of the scale, 12")]
)
def test_scales_that_do_not_fit_are_refused(scale, says, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dataclasses.replace(TINY, scale=scale))
    flags = ["--single", "--steps", "1", "--tile", "32", "-o", str(tmp_path / "x.onnx")]
    assert cli.main([str(checkpoint), *flags]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "x.onnx").exists()


def test_an_autoencoder_alone_is_refused(tmp_path, capsys):
    tiny_checkpoint(tmp_path / "vae")
    assert cli.main([str(tmp_path / "vae"), "--single", "--steps", "1", "-o", str(tmp_path / "x.onnx")]) == 2
    assert "no sampler to unroll" in capsys.readouterr().err and not (tmp_path / "x.onnx").exists()


def test_existing_names_are_kept(tiny, tmp_path, capsys):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file.onnx").write_text("mine")
    for name, says in (("folder.onnx", "is not a file"), ("file.onnx", "replace it with --force")):
        assert cli.main([str(tiny), "--single", "--steps", "1", "-o", str(tmp_path / name)]) == 1
        assert says in capsys.readouterr().err
    assert (tmp_path / "file.onnx").read_text() == "mine"


def test_failed_proof_and_a_file_that_would_be_too_large_leave_nothing(tiny, tmp_path, monkeypatch, capsys):
    flags = ["--single", "--steps", "1", "--tile", str(TILE), "-o", str(tmp_path / "x.onnx")]
    monkeypatch.setattr(write, "MOST_BYTES", 1000)
    assert cli.main([str(tiny), *flags]) == 2
    assert "one ONNX file holds at most 2 GB" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(parity.THRESHOLDS, ("fp32", "fp32"), 0.0)
    assert cli.main([str(tiny), *flags]) == 3
    assert "nothing was published" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
@pytest.mark.parametrize("convention", ["matlab", "torch"])
def test_enlarging_equals_the_runtimes(factor, convention):
    """Sides that are small and differ, so that every pixel is near an edge."""
    image = np.random.default_rng(factor).integers(0, 256, (4, 7, 3), np.uint8)
    g = GraphBuilder("enlarge")
    levels = g.input("levels", (1, 3, 4, 7))
    g.output("large", enlarge(g, levels, factor, convention))
    got = graphs_run(g.finish(), {"levels": np.float32(image.transpose(2, 0, 1)[None])})[0]
    deep = image if convention == "matlab" else image.astype(np.uint16) * np.uint16(257)
    want = imresize(deep, 4 * factor, 7 * factor, convention=convention).transpose(2, 0, 1)
    np.testing.assert_allclose(got, want / (1 if deep is image else 257), atol=2.1e-3)


@pytest.fixture(scope="module")
def dynamic(tiny, tmp_path_factory) -> Path:
    flags = ["--dynamic", "--steps", "1", "--seed", SEED, "--fidelity", FIDELITY]
    return export(tiny, tmp_path_factory.mktemp("single") / "dynamic.onnx", *flags)


def test_dynamic_file_takes_other_sizes(dynamic, tiny, monkeypatch):
    """A fixed file of another size with the same, repeated noise gives the same result."""
    height, width = 16, 24
    session = ort.InferenceSession(dynamic, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, "height", "width"]
    image = np.random.default_rng(0).random((1, 3, height, width), np.float32)
    (got,) = session.run(None, {"input": image})
    once = noise.gaussian

    def repeated(seed: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
        side = TILE // 4
        return np.tile(once(seed, step, (shape[0], side, side)), (1, 3, 3))[:, : shape[1], : shape[2]]

    monkeypatch.setattr(noise, "gaussian", repeated)
    checkpoint = load_checkpoint(tiny)
    run_options = write.RunOptions(steps=1, seed=int(SEED), fidelity=float(FIDELITY))
    recipe = write.make_recipe(checkpoint.config, run_options)
    with torch.inference_mode():
        family = family_of(checkpoint, None)
        built, _ = single_graph(family, recipe, height, width, lowering("gpu"))
    assert relative_l2(got, graphs_run(built, {"input": image})) < 1e-4


@pytest.mark.parametrize("height", [8, 40])
def test_tools_can_fix_the_sizes_of_a_dynamic_file(height, dynamic):
    """Both chaiNNer and vs-mlrt write the sizes of their tiles into the input and infer the output's."""
    model = onnx.load(dynamic)
    assert facts(dynamic)["input_multiple"] == "8"
    for axis, size in ((2, height), (3, 16)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    sizes = [d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim]
    assert sizes == [1, 3, 4 * height, 64]


@pytest.mark.slow
def test_half_precision_keeps_float32_inputs_and_outputs(tiny, single, tmp_path):
    path = export(tiny, tmp_path / "half.onnx", "--fp16", *MODELS["moe-sr"][1])
    assert path.stat().st_size < 0.6 * single.stat().st_size
    image = proof.seeded_image(TILE // 4, TILE // 4)
    assert np.isfinite(run(path, image)).all()
