"""Engines of autoencoders for text-to-image models: manifest, schema, and agreement with the networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from autoencoders import TILE, tiny_checkpoint, tiny_engine
from published_networks import load

from moesr.export import parity
from moesr.export.cli import main as export
from moesr.export.graph_writer import GraphWriter
from moesr.export.lowering import CPU
from moesr.export.model_card import model_card
from moesr.export.options import ExportOptions
from moesr.export.package import export_engine
from moesr.export.vae_engine import write_graphs
from moesr.runtime.cli import doctor, run
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError, UsageError
from moesr.training.checkpoint import load_checkpoint, save_checkpoint
from moesr.training.config import KL_F8, VaeConfig
from moesr.training.networks import Autoencoder

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs/engine-format.schema.json").read_text())
LIMIT = 2e-5


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    return tiny_engine(tmp_path_factory.mktemp("vae") / "engine")


def test_manifest_is_of_its_own_kind(engine):
    stored = json.loads((engine / "manifest.json").read_text())
    jsonschema.validate(stored, SCHEMA)
    assert (stored["kind"], stored["name"], stored["latent_scale"]) == ("autoencoder", "kl-f8", 0.18215)
    assert not {"scale", "schedule", "sampler", "steps", "experts", "prediction"} & stored.keys()
    assert list(stored["graphs"]) == ["encoder", "decoder", "unrefined"]
    assert stored["graphs"]["decoder"]["data"] == stored["graphs"]["unrefined"]["data"]
    params = {role: graph["params"] for role, graph in stored["graphs"].items()}
    network = load_checkpoint(engine.with_name("engine-checkpoint")).decoder()
    refinement = sum(p.numel() for p in network.decoder.unet_1.parameters())
    assert params["decoder"] - params["unrefined"] == refinement


@pytest.mark.parametrize("entry", ["kind", "graphs"])
def test_runtime_and_schema_refuse_the_same(engine, tmp_path, entry):
    stored = json.loads((engine / "manifest.json").read_text())
    if entry == "kind":
        stored["kind"] = "other"
    else:
        stored["graphs"]["expert_0"] = stored["graphs"].pop("decoder")
    (tmp_path / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(stored, SCHEMA)
    with pytest.raises(EngineError, match="kind" if entry == "kind" else "no graph 'decoder'"):
        read_manifest(tmp_path, kinds=("autoencoder",))


def test_graphs_agree_with_the_networks(engine):
    network = load_checkpoint(engine.with_name("engine-checkpoint")).decoder()
    rng, side = np.random.default_rng(0), TILE // 8
    z = rng.standard_normal((2, 4, side, side), np.float32)
    image = rng.uniform(-1, 1, (2, 3, TILE, TILE)).astype(np.float32)
    noise = rng.standard_normal(z.shape, np.float32)
    with torch.inference_mode():
        tensor = torch.from_numpy(z) / 0.18215
        want = {"decoder": network.decode(tensor), "unrefined": network.decode(tensor, refined=False)}
        want["encoder"] = 0.18215 * network.sample(torch.from_numpy(image), torch.from_numpy(noise))
    given = {"encoder": {"image": image, "noise": noise}}
    for role, result in want.items():
        got = parity.outputs(engine / f"{role}.onnx", given.get(role, {"z": z}))[0]
        assert parity.relative_l2(got, result.numpy()) < LIMIT, role


def test_other_programs_name_the_right_one(engine, tmp_path, capsys):
    assert run.main(["--engine", str(engine), "image.png"]) == 3
    assert f"moesr-decode --engine {engine}" in capsys.readouterr().err
    assert doctor.main(["--engine", str(engine)]) == 0
    out = capsys.readouterr().out
    assert "scaling factor 0.18215" in out and "output (3, 64, 64)" in out


def test_model_card(engine):
    manifest = read_manifest(engine, kinds=("autoencoder",))
    card = model_card(manifest, engine, "owner/name")
    assert (
        "moesr-decode latents.pt --engine hf://owner/name" in card and "| scaling factor | 0.18215 |" in card
    )
    assert "sampling" not in card


@pytest.mark.parametrize("options", [("--reuse",), ("--guidance", "2"), ("--single", "--steps", "2")])
def test_options_of_other_families(engine, tmp_path, capsys, options):
    checkpoint = engine.with_name("engine-checkpoint")
    assert export([str(checkpoint), "-o", str(tmp_path / "new"), *options]) == 2
    error = capsys.readouterr().err
    assert "kl-f8" in error or "has no sampler" in error
    with pytest.raises(UsageError, match="kl-f8 has no int8 export"):
        export_engine(load_checkpoint(checkpoint), tmp_path / "new", ExportOptions(precision="int8"))


def test_decoder_alone_and_plain_autoencoder(tmp_path):
    alone = tiny_engine(tmp_path / "alone", encoder=False)
    assert list(read_manifest(alone, kinds=("autoencoder",)).graphs) == ["decoder", "unrefined"]
    plain = tiny_checkpoint(tmp_path / "plain", refinement="none")
    options = ExportOptions(tile_px=TILE, precision="fp16", target="gpu")
    manifest = export_engine(plain, tmp_path / "engine", options)
    assert list(manifest.graphs) == ["encoder", "decoder"] and manifest.precision == "fp16"


@pytest.mark.parametrize("width", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_graphs_match_golden(width, golden, published_weights, tmp_path):
    name = f"sd15_decoder_c{width}"
    config = VaeConfig(decoder=dataclasses.replace(KL_F8, channels=width))
    network = load(Autoencoder(config.decoder), published_weights(name, "dev"))
    checkpoint, data = save_checkpoint(tmp_path / "model", config, (), network.state_dict()), golden(name)
    side = data["latent"].shape[-1]
    with torch.inference_mode():
        writer = GraphWriter(tmp_path, {"cpu": CPU}, lambda stage: None)
        write_graphs(checkpoint, 8 * side, writer)
    for role, key in (("decoder", "decoded"), ("unrefined", "decoded_plain")):
        got = parity.outputs(tmp_path / f"{role}.onnx", {"z": data["latent"]})[0]
        assert data.error(key, got) < LIMIT
    if width == 32:  # the full-width golden's image is smaller than its latent
        got = parity.outputs(tmp_path / "encoder.onnx", {"image": data["image"], "noise": data["noise"]})[0]
        assert data.error("sample", got / np.float32(0.18215)) < LIMIT
