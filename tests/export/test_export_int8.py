"""Engines in int8: each expert is calibrated on photographs, and sensitive layers stay float32."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import relative_l2
from graphs import PLAIN_LDM, TINY, random_network, run, write_checkpoint
from PIL import Image
from torch import nn

from moesr.export import cli, parity
from moesr.export.graphs.builder import GraphBuilder
from moesr.export.graphs.expert import expert_graph
from moesr.export.graphs.layers import conv_module
from moesr.export.lowering import lowering
from moesr.export.quantisation import calibration, int8, qdq
from moesr.runtime import Upscaler
from moesr.runtime.backends.ort import session_options
from moesr.runtime.cli import doctor
from moesr.runtime.engine.graph_spec import BATCH, Calibration
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.system import cpu
from moesr.training.checkpoint import load_checkpoint
from moesr.training.config import UNetConfig

TILE, LATENT, IMAGES = 32, 8, 5
INT8 = lowering("cpu", "int8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder of five photographs, one of them smaller than a tile."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i, size in enumerate(((40, 50), (36, 33), (24, 28), (60, 40), (33, 33))):
        smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8)).resize(size[::-1]))
        Image.fromarray(smooth).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("not a photograph")
    return folder


@pytest.fixture(scope="module")
def recording(checkpoint, photographs) -> calibration.Recording:
    return calibration.record(load_checkpoint(checkpoint), calibration.photographs(photographs), TILE, 5)


@pytest.fixture(scope="module")
def engine(checkpoint, photographs, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("engine") / "int8"
    flags = ["--int8", "--calibrate", str(photographs), "--tile", str(TILE), "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "TRIALS", 3)
        assert cli.main([str(checkpoint), "-o", str(directory), *flags]) == 0
    return directory


@pytest.fixture(scope="module")
def expert(checkpoint) -> int8.Make:
    network = load_checkpoint(checkpoint).expert(0)
    return lambda side, choices: expert_graph(network, side, choices)


def test_every_expert_is_recorded_at_its_own_timesteps(recording):
    for k, (t_from, t_to) in enumerate(TINY.expert_ranges):
        own = recording.inputs[f"expert_{k}"]
        assert {t_from <= float(given["t"][0]) < t_to for given in own} == {True}
        assert len(own) % IMAGES == 0
    assert sum(len(own) for own in recording.inputs.values()) == IMAGES * (recording.steps + 1)
    assert recording.inputs["decoder"][2]["lr"].shape == (1, 3, TILE, TILE)


def test_recorded_inputs_equal_those_of_the_runtime(checkpoint, photographs, tmp_path, recording):
    """The decoder's recorded latent is the one that moesr-run computes from the same LR image and noise."""
    directory = tmp_path / "fp32"
    assert cli.main([str(checkpoint), "-o", str(directory), "--tile", str(TILE), "--quiet"]) == 0
    photo = calibration.photographs(photographs)[0]
    lr = np.asarray(calibration.reduced(photo, 4, TILE))
    want = run(directory / "decoder.onnx", recording.inputs["decoder"][0])[0]
    with Upscaler(directory, device="cpu") as up:
        got = up(lr, steps=recording.steps, seed=0, color_fix="none")
    pixels = np.rint((np.clip(want, -1, 1) + 1) * 127.5).transpose(1, 2, 0)
    assert np.abs(got.astype(float) - pixels).max() <= 1


def test_last_photograph_is_used_for_the_parity_check_only(recording):
    apart = recording.inputs["decoder"][-1]["z"]
    np.testing.assert_array_equal(recording.proving("decoder")["z"], apart)
    assert len(recording.calibrating("decoder")) == IMAGES - 1
    own, proof = recording.inputs["expert_1"], recording.proving("expert_1")
    assert proof["z_t"].shape[0] == 2 and proof["t"].tolist() == [own[0]["t"][0], own[-1]["t"][0]]
    assert not any(proof["z_t"][0:1] is given["z_t"] for given in recording.calibrating("expert_1"))


def test_plain_model_is_calibrated(photographs, tmp_path, monkeypatch):
    """The model has one expert, and a decoder without the LR image."""
    monkeypatch.setattr(int8, "TRIALS", 1)
    checkpoint = write_checkpoint(tmp_path / "plain", dataclasses.replace(PLAIN_LDM, steps=3))
    flags = ["--int8", "--calibrate", str(photographs), "--tile", str(TILE), "--quiet"]
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "engine"), *flags]) == 0
    assert read_manifest(tmp_path / "engine").graphs["expert_0"].calibration


def test_steps_are_added_until_every_expert_has_one(checkpoint):
    assert set(calibration.step_list(load_checkpoint(checkpoint).config, 1).expert) == {0, 1}


def test_ranges_cover_the_observed_values(expert, recording):
    built = expert(LATENT, INT8)
    layers = qdq.layers_of(built)
    own = recording.calibrating("expert_0")
    ranges = int8.observe(built, layers, own)
    values = np.concatenate([np.concatenate([i["z_t"], i["cond"]], 1).ravel() for i in own])
    low, high = ranges[0][0]
    assert low == pytest.approx(values.min(), rel=0.05) and high == pytest.approx(values.max(), rel=0.05)


def test_observed_tensors_are_not_kept_in_memory(tmp_path, monkeypatch):
    """All tensors of a full-width decoder together would take ten times the memory of a run."""
    g = GraphBuilder("chain", INT8)
    h = g.input("x", (BATCH, 8, 64, 64))
    for k in range(12):
        h = conv_module(g, h, random_network(nn.Conv2d(8, 8, 3, padding=1), k))
    g.output("y", h)
    built, sessions = g.finish(), []

    def profiled(model):
        options = session_options()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        sessions.append(ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]))
        return sessions[-1]

    monkeypatch.setattr(int8, "open_model", profiled)
    int8.observe(built, qdq.layers_of(built), [{"x": np.ones((1, 8, 64, 64), np.float32)}])
    events = json.loads(Path(sessions[0].end_profiling()).read_text())
    used = [int(e["args"]["mem_bytes_in_use"]) for e in events if "mem_bytes_in_use" in e.get("args", {})]
    assert max(used) < 6 * (4 * 8 * 64 * 64)


def test_layers_do_not_depend_on_the_tile_size(expert):
    small, large = (qdq.layers_of(expert(side, INT8)) for side in (LATENT, 4 * LATENT))
    for a, b in zip(small, large, strict=True):
        np.testing.assert_array_equal(a.weight, b.weight)


def test_sensitivity_of_a_layer_is_the_error_of_that_layer_alone(expert, recording):
    """The reference is a graph in which only that layer is int8."""
    built = expert(LATENT, INT8)
    layers, own = qdq.layers_of(built), recording.calibrating("expert_0")[:2]
    ranges = int8.observe(built, layers, own)
    errors = int8.sensitivities(built, layers, ranges, own)
    want = np.stack([run(built, given) for given in own])
    for i in (0, 5, len(layers) - 1):
        alone = qdq.quantised(built, layers, ranges, set(range(len(layers))) - {i})
        got = np.stack([run(alone, given) for given in own])
        assert errors[i] == pytest.approx(relative_l2(got, want), rel=1e-3)


def test_squared_errors_of_layers_add_up(expert, recording):
    """The choice of the layers to keep in float32 relies on this."""
    built = expert(LATENT, INT8)
    layers, own = qdq.layers_of(built), recording.calibrating("expert_0")[:3]
    ranges = int8.observe(built, layers, own)
    estimate = np.linalg.norm(int8.sensitivities(built, layers, ranges, own))
    got, want = (
        np.stack([run(graph, given) for given in own])
        for graph in (qdq.quantised(built, layers, ranges), built)
    )
    assert relative_l2(got, want) == pytest.approx(estimate, rel=0.3)


def test_layers_to_keep_are_chosen_by_error_per_mac():
    """Layers with the most error per multiply-accumulate are kept first, as many as the budget needs."""
    errors, macs = [0.03, 0.04, 0.001, 0.002], [100, 1000, 10, 1000]
    assert int8.to_keep(errors, macs, 0.1) == set()
    assert int8.to_keep(errors, macs, 0.045) == {0}
    assert int8.to_keep(errors, macs, 0.01) == {0, 1}
    assert int8.to_keep(errors, macs, 0.0) == {0, 1, 2, 3}


def test_weights_and_biases_are_rounded_to_the_nearest_step(expert, recording):
    """Each weight differs by at most half a step, which is 1/127 of the channel's largest weight."""
    built = expert(LATENT, INT8)
    layers = qdq.layers_of(built)
    ranges = int8.observe(built, layers, recording.calibrating("expert_0"))
    model = qdq.quantised(built, layers, ranges).model
    stored = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == 3]
    for layer in layers:
        rounded = next(a for a in stored if a.shape == layer.weight.shape and matches(a, layer))
        assert np.abs(rounded).max() == 127


def matches(rounded: np.ndarray, layer: qdq.Layer) -> bool:
    others = tuple(axis for axis in range(layer.weight.ndim) if axis != layer.axis)
    step = np.abs(layer.weight).max(axis=others, keepdims=True) / 127
    return bool(np.all(np.abs(rounded * step - layer.weight) <= 0.5001 * step))


def test_manifest_describes_the_calibration(engine):
    manifest = read_manifest(engine)
    assert manifest.precision == "int8"
    for role, graph in manifest.graphs.items():
        found, proof = graph.calibration, graph.parity
        assert found and proof and 0 < proof.relative_l2 < proof.threshold == 3e-2
        assert (found.images, found.method) == (IMAGES - 1, int8.METHOD)
        assert found.runs == (IMAGES - 1) * (
            1 if role == "decoder" else found.steps * (0.4, 0.6)[int(role[-1])]
        )
        assert 0.3 < found.int8_fraction < 1.0


def test_files_are_smaller(engine, checkpoint):
    weights = sum(path.stat().st_size for path in checkpoint.glob("expert_*.safetensors"))
    assert sum(path.stat().st_size for path in engine.glob("expert_*.onnx")) < 0.9 * weights


def test_runtime_runs_the_engine(engine):
    image = np.random.default_rng(5).integers(0, 256, (12, 10, 3), np.uint8)
    with Upscaler(engine, device="cpu") as up:
        assert up(image, steps=2, seed=0).shape == (48, 40, 3)


def test_openvino_agrees_with_onnx_runtime(engine, recording):
    """The tolerance allows for values half-way between two integers, which may be rounded either way."""
    ov = pytest.importorskip("openvino")
    model = ov.Core().read_model(engine / "expert_1.onnx")
    given = recording.inputs["expert_1"][0]
    model.reshape({name: list(value.shape) for name, value in given.items()})
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = next(iter(compiled(given).values()))
    assert relative_l2(got, run(engine / "expert_1.onnx", given)) < 2e-2


def test_doctor_shows_int8(engine, capsys):
    assert doctor.main(["--engine", str(engine)]) == 0
    shown = capsys.readouterr().out
    assert "int8 expert_0" in shown and "4 images" in shown and "layers left in float32" in shown


def test_same_recording_gives_the_same_bytes(expert, recording, monkeypatch):
    monkeypatch.setattr(int8, "TRIALS", 1)
    first, second = (int8.int8_graph(expert, "expert_0", LATENT, recording, INT8) for _ in range(2))
    assert first.to_bytes() == second.to_bytes()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "name a folder of them with --calibrate"),
        (["--calibrate", "nowhere"], "no such folder"),
        (["--calibrate", "EMPTY"], "0 photographs there, expected 2 or more"),
        (["--calibrate", "PHOTOGRAPHS", "--target", "gpu"], "is for CPUs"),
        (["--calibrate", "PHOTOGRAPHS", "--target", "both"], "is for CPUs"),
    ],
)
def test_wrong_options_are_refused(flags, says, checkpoint, photographs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": str(tmp_path / "empty"), "PHOTOGRAPHS": str(photographs)}
    arguments = [str(checkpoint), "--int8", "--tile", str(TILE), "-o", str(tmp_path / "engine")]
    assert cli.main([*arguments, *(names.get(flag, flag) for flag in flags)]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "engine").exists()


def test_unreadable_photograph_is_reported(checkpoint, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not an image")
    flags = ["--int8", "--calibrate", str(tmp_path), "-o", str(tmp_path / "engine")]
    assert cli.main([str(checkpoint), *flags]) == 1
    assert "a.png: not an image of a known kind" in capsys.readouterr().err


def test_larger_error_budget_makes_more_layers_int8(recording, expert):
    """It also widens the tolerance of the parity check."""

    def calibrated(error: float) -> Calibration:
        choices = dataclasses.replace(INT8, int8_error=error)
        found = int8.int8_graph(expert, "expert_0", LATENT, recording, choices).calibration
        assert found
        return found

    fine, coarse, all_layers = map(calibrated, (2e-3, 2e-2, 1.0))
    assert fine.int8_fraction < coarse.int8_fraction <= all_layers.int8_fraction and not all_layers.kept
    assert parity.threshold(dataclasses.replace(INT8, int8_error=0.5)) == 1.5


@pytest.mark.parametrize("error", ["0", "-1", "nan", "inf", "much"])
def test_error_budget_must_be_a_positive_number(error, capsys):
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["--int8", "--int8-error", error])
    assert "expected a number above 0" in capsys.readouterr().err


def test_result_beyond_the_error_budget_is_refused(engine, recording):
    path, want = engine / "expert_0.onnx", np.ones((1, 3, LATENT, LATENT), np.float32)
    with pytest.raises(parity.ParityError, match=r"accepted for int8.*calibrate on more photographs"):
        parity.judge(path, 1.05 * want, want, INT8)


def test_demo_models_are_calibrated_on_bundled_photographs(monkeypatch):
    args = cli.parser().parse_args(["--int8", "--photographs", "3"])
    assert len(cli._photographs(args)) == 3


@pytest.mark.parametrize(("flags", "warned"), [("avx2 fma", True), ("avx2 avx512_vnni", False), ("", False)])
def test_cpus_without_vnni_warn_that_products_overflow(flags, warned, engine, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "extensions", lambda: flags)
    with Upscaler(engine, device="cpu", threads=1):
        assert ("no VNNI" in caplog.text) == warned


@pytest.mark.slow
def test_full_width_experts_meet_the_error_bound(tmp_path, photographs, monkeypatch):
    """Each expert has random weights and is tested at timesteps of its own range."""
    config = dataclasses.replace(TINY, name="wide", unet=UNetConfig(space_experts=1), steps=2)
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "wide", config))
    monkeypatch.setattr(int8, "TRIALS", 2)
    recording = calibration.record(checkpoint, calibration.photographs(photographs), 128)
    for k in range(2):
        network = checkpoint.expert(k)
        with torch.inference_mode():
            built = int8.int8_graph(partial(expert_graph, network), f"expert_{k}", 32, recording, INT8)
        given = recording.proving(f"expert_{k}")
        assert relative_l2(run(built, given), parity.network_output(network, given)) < 3e-2
        assert built.calibration and built.calibration.int8_fraction > 0.3
