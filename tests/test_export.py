"""Exported graphs compute what the networks do, and an engine directory is whole or absent."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import relative_l2
from graphs import random_network, run

from moesr.export import cli, decoder, package, parity, refinement, winograd
from moesr.export.decoder import decoder_graph
from moesr.export.expert import expert_graph
from moesr.export.graph import BATCH, OPSET
from moesr.runtime.errors import EngineError
from moesr.runtime.manifest import Manifest
from moesr.training.checkpoint import save_checkpoint
from moesr.training.config import AutoencoderConfig, ModelConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet

TILE = 64
MODEL = ModelConfig(
    name="tiny",
    unet=UNetConfig(width=32, space_experts=1),
    decoder=AutoencoderConfig(channels=32, codebook_size=64),
    expert_ranges=((0, 400), (400, 1000)),
)
PLAIN_LDM = dataclasses.replace(
    MODEL,
    name="plain",
    unet=UNetConfig(width=32, space_experts=0),
    decoder=AutoencoderConfig(channels=32, codebook_size=64, fusion_level=None, refinement="none"),
    expert_ranges=((0, 1000),),
)
LIMITS = {"fp32": 2e-5, "fp16": 3e-3}


def write_checkpoint(directory: Path, config: ModelConfig) -> Path:
    assert config.unet
    experts = [
        random_network(DenoisingUNet(config.unet), k).state_dict() for k in range(len(config.expert_ranges))
    ]
    save_checkpoint(directory, config, experts, random_network(Autoencoder(config.decoder), 99).state_dict())
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", MODEL)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def engine(request, checkpoint, tmp_path_factory) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("engine") / request.param
    flags = ["--fp16"] if request.param == "fp16" else []
    assert cli.main([str(checkpoint), "-o", str(directory), "--tile", str(TILE), *flags]) == 0
    return directory, Manifest.read(directory)


def decoder_inputs(
    network: Autoencoder, batch: int, fidelity: float, side: int = TILE
) -> dict[str, np.ndarray]:
    one = parity.decoder_inputs(network, side // 4)
    flips = [one[key][:, :, ::-1] for key in ("z", "lr")]
    z, lr = (
        np.ascontiguousarray(np.concatenate([one[k], f])[:batch])
        for k, f in zip(("z", "lr"), flips, strict=True)
    )
    return {"z": z, "lr": lr, "fidelity": np.array([fidelity], np.float32)}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("k", [0, 1])
def test_expert_on_other_inputs(engine, k, batch):
    directory, manifest = engine
    network, rng = random_network(DenoisingUNet(MODEL.unet), k), np.random.default_rng(3)
    z_t, cond = rng.standard_normal((2, batch, 3, TILE // 4, TILE // 4), np.float32)
    inputs = {"z_t": z_t, "cond": cond, "t": np.array([7, 999, 400], np.float32)[:batch]}
    want = parity.network_output(network, inputs)
    assert relative_l2(run(directory / f"expert_{k}.onnx", inputs), want) < LIMITS[manifest.precision]


@pytest.mark.parametrize(("batch", "fidelity"), [(1, 1.0), (2, 0.3), (1, 0.0)])
def test_decoder_on_other_inputs(engine, batch, fidelity):
    directory, manifest = engine
    network = random_network(Autoencoder(MODEL.decoder), 99)
    inputs = decoder_inputs(network, batch, fidelity)
    want = parity.network_output(network, inputs)
    assert relative_l2(run(directory / "decoder.onnx", inputs), want) < LIMITS[manifest.precision]


def test_manifest(engine, checkpoint):
    _, manifest = engine
    assert (manifest.name, manifest.tile, manifest.latent_tile, manifest.scale) == (
        "tiny",
        TILE,
        TILE // 4,
        4,
    )
    assert manifest.expert_ranges == MODEL.expert_ranges
    assert set(manifest.parity) == {"expert_0", "expert_1", "decoder"}
    for proof in manifest.parity.values():
        assert 0 < proof.relative_l2 < proof.threshold == parity.THRESHOLDS[manifest.precision]
    assert manifest.versions["opset"] == str(OPSET)
    assert manifest.params["expert"] == sum(p.numel() for p in DenoisingUNet(MODEL.unet).parameters())


def test_graph_contract(engine):
    """Float32 at the boundary, a free batch, fixed sides, valid ONNX of the stated opset."""
    directory, _ = engine
    for name in ("expert_0", "decoder"):
        model = onnx.load(directory / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert [o.version for o in model.opset_import if not o.domain] == [OPSET]
        ends = [*model.graph.input, *model.graph.output]
        assert {v.type.tensor_type.elem_type for v in ends} == {onnx.TensorProto.FLOAT}
        shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in ends}
        latent, image = [BATCH, 3, TILE // 4, TILE // 4], [BATCH, 3, TILE, TILE]
        expert = {"z_t": latent, "cond": latent, "t": [BATCH], "eps": latent}
        assert shapes == (
            expert if name == "expert_0" else {"z": latent, "lr": image, "fidelity": [1], "image": image}
        )


def test_decoder_holds_what_it_needs(engine):
    """No FFT operator, no BatchNorm, no half of the encoder past the fused level, no constant twice."""
    model = onnx.load(engine[0] / "decoder.onnx")
    assert not {n.op_type for n in model.graph.node} & {"DFT", "STFT", "BatchNormalization", "Einsum"}
    scopes = {part for n in model.graph.node for part in [n.name] if "encoder" in part}
    assert any("encoder/down.1" in s for s in scopes) and not any("encoder/down.2" in s for s in scopes)
    weights = Counter((tuple(t.dims), t.data_type, t.raw_data) for t in model.graph.initializer)
    assert max(weights.values()) == 1


def test_half_precision_keeps_float32_where_needed():
    """Statistics, softmax, quantiser and the whole filter in float32; every other convolution in half."""
    network = random_network(Autoencoder(MODEL.decoder), 99)
    with torch.inference_mode():
        model = decoder_graph(network, TILE // 4, half=True).model
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    seen = Counter()
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm", "Softmax", "InstanceNormalization"):
            keeps = "/filter/" in node.name or node.op_type in ("Gemm", "Softmax", "InstanceNormalization")
            assert kinds[node.output[0]] == (single if keeps else half), node.name
            seen[node.op_type, keeps] += 1
    assert len(seen) == 7  # convolutions and products of both kinds
    large = [t.data_type for t in model.graph.initializer if np.prod(t.dims) > 4096]
    assert large.count(half) > 0.8 * len(large)


def test_plain_ldm(tmp_path):
    """One expert, no Space MoE, no fusion, no refinement: `lr` and `fidelity` are there, changing nothing."""
    source = write_checkpoint(tmp_path / "ldm", PLAIN_LDM)
    assert cli.main([str(source), "-o", str(tmp_path / "engine"), "--tile", "32"]) == 0
    network = random_network(Autoencoder(PLAIN_LDM.decoder), 99)
    inputs = decoder_inputs(network, 2, 0.5, side=32)
    got = run(tmp_path / "engine" / "decoder.onnx", inputs)
    assert relative_l2(got, parity.network_output(network, inputs)) < LIMITS["fp32"]
    np.testing.assert_array_equal(
        got, run(tmp_path / "engine" / "decoder.onnx", inputs | {"lr": -inputs["lr"]})
    )


@pytest.mark.parametrize(("key", "fidelity"), [("image_w1", 1.0), ("image_w05", 0.5), ("image_w0", 0.0)])
@torch.inference_mode()
def test_published_decoder(key, fidelity, golden, published_weights):
    network, data = (
        Autoencoder(AutoencoderConfig(channels=32, codebook_size=256)).eval(),
        golden("decoder_c32"),
    )
    weights = published_weights("decoder_c32", "dev")
    network.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in weights.items()})
    inputs = {"z": data["z"], "lr": data["lr_upsampled"], "fidelity": np.array([fidelity], np.float32)}
    image = run(decoder_graph(network, 32), inputs)
    assert relative_l2(data.thinned(image), data[key]) < 1e-5 * data.leeway


@torch.inference_mode()
def test_published_expert(golden, published_weights):
    """Sixteen space experts, merged on the way into the graph."""
    network, data = DenoisingUNet(UNetConfig(width=32)).eval(), golden("unet_w32")
    weights = published_weights("unet_w32", "dev")
    network.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in weights.items()})
    x, t = data["x"], data["t"].astype(np.float32)
    got = run(expert_graph(network, 32), {"z_t": x[:, :3], "cond": x[:, 3:], "t": t})
    assert relative_l2(got, data["eps"]) < 1e-5


@pytest.mark.slow
@torch.inference_mode()
def test_published_decoder_full_width(golden, published_weights):
    network, data = Autoencoder(AutoencoderConfig()).eval(), golden("decoder_c128")
    weights = published_weights("decoder_c128", "dev")
    network.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in weights.items()})
    noise = np.random.Generator(np.random.PCG64(int(data["lr_seed"]))).standard_normal((1, 3, 512, 512))
    lr = (np.clip(noise, -2, 2) / 2).astype(np.float32)
    inputs = {"z": data["z"], "lr": lr, "fidelity": np.ones(1, np.float32)}
    image = run(decoder_graph(network, 128), inputs)
    assert (
        relative_l2(image[:, :, ::4, ::4], data["image_every_4th"]) < 1e-4
    )  # of which the golden's own float32 norms are a part


@pytest.mark.slow
@torch.inference_mode()
def test_published_expert_full_width(golden, published_weights):
    network, data = DenoisingUNet(UNetConfig()).eval(), golden("unet_w160")
    weights = published_weights("unet_w160", "dev")
    network.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in weights.items()})
    x, t = data["x"], data["t"].astype(np.float32)
    got = run(expert_graph(network, 128), {"z_t": x[:, :3], "cond": x[:, 3:], "t": t})
    assert relative_l2(got, data["eps"]) < 1e-5


@torch.inference_mode()
def test_strips_change_nothing(monkeypatch):
    """Rows, channel blocks, queries and codes cut as finely as they go; zeros at the borders included."""
    monkeypatch.setattr(refinement, "STRIP_BYTES", 1 << 14)
    monkeypatch.setattr(decoder, "SCORE_BYTES", 1 << 13)
    monkeypatch.setattr(winograd, "STRIP_TILES", 24)
    network = random_network(Autoencoder(MODEL.decoder), 4)
    inputs = decoder_inputs(network, 2, 0.7, side=32)
    graph = decoder_graph(network, 8)
    assert Counter(n.op_type for n in graph.model.graph.node)["ArgMin"] == 2
    assert relative_l2(run(graph, inputs), parity.network_output(network, inputs)) < LIMITS["fp32"]


def test_same_checkpoint_same_bytes(engine, checkpoint, tmp_path):
    _, manifest = engine
    flags = ["--fp16"] if manifest.precision == "fp16" else []
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "again"), "--tile", str(TILE), *flags]) == 0
    again = Manifest.read(tmp_path / "again")
    assert [g.sha256 for g in again.graphs] == [g.sha256 for g in manifest.graphs]


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def fail_parity(monkeypatch):
    monkeypatch.setitem(parity.THRESHOLDS, "fp32", 0.0)


def interrupt(monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "prove", stop)


@pytest.mark.parametrize(("spoil", "code"), [(fail_parity, 3), (interrupt, 130)], ids=["parity", "ctrl-c"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_failure_leaves_the_place_as_it_was(spoil, code, existing, checkpoint, tmp_path, monkeypatch, capsys):
    target = tmp_path / "engine"
    if existing:
        assert cli.main([str(checkpoint), "-o", str(target), "--tile", "32"]) == 0
    before = snapshot(tmp_path)
    spoil(monkeypatch)
    assert cli.main([str(checkpoint), "-o", str(target), "--tile", "32", "--force"]) == code
    assert snapshot(tmp_path) == before and (existing or not any(tmp_path.iterdir()))
    assert "nothing was" in capsys.readouterr().err


def test_existing_engine_needs_force(checkpoint, tmp_path, capsys):
    target, arguments = tmp_path / "engine", [str(checkpoint), "-o", str(tmp_path / "engine")]
    assert cli.main([*arguments, "--tile", "32"]) == 0
    before = snapshot(target)
    assert cli.main([*arguments, "--tile", "64"]) == 1
    assert "--force" in capsys.readouterr().err and snapshot(target) == before
    assert cli.main([*arguments, "--tile", "64", "--force"]) == 0
    assert Manifest.read(target).tile == 64 and [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_force_spares_what_is_no_engine(checkpoint, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    assert cli.main([str(checkpoint), "-o", str(tmp_path / "photos"), "--tile", "32", "--force"]) == 1
    assert "no engine" in capsys.readouterr().err
    assert snapshot(tmp_path) == {"photos/cat.png": b"cat"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere"], 1, "not a directory"),
        (["CHECKPOINT", "--tile", "100"], 2, "try 96 or 128"),
        (["CHECKPOINT", "--tile", "8"], 2, "try 32"),
        (["CHECKPOINT", "--tile", "-64"], 2, "try 32"),
    ],
)
def test_bad_input(arguments, code, says, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(checkpoint) if a == "CHECKPOINT" else a for a in arguments]) == code
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error and not any(tmp_path.iterdir())


def test_default_output_and_demo_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package.resources, "files", lambda name: tmp_path)
    assert cli.main(["--tile", "32"]) == 2
    assert "no demo checkpoint" in capsys.readouterr().err
    (tmp_path / "demo_checkpoints").mkdir()
    for number, arguments in ((4, []), (8, ["demo-x8", "-o", "other"])):
        (tmp_path / f"demo_checkpoints/demo-x{number}").symlink_to(checkpoint)
        assert cli.main([*arguments, "--tile", "32"]) == 0
    assert Manifest.read(tmp_path / "tiny-fp32").name == Manifest.read(tmp_path / "other").name == "tiny"


def test_decoder_alone_is_refused(tmp_path, capsys):
    config = ModelConfig(name="kl", unet=None, decoder=AutoencoderConfig(channels=32, codebook_size=64))
    state = random_network(Autoencoder(config.decoder), 0).state_dict()
    save_checkpoint(tmp_path / "kl", config, [], state)
    assert cli.main([str(tmp_path / "kl"), "-o", str(tmp_path / "engine")]) == 2
    assert "decoder on its own" in capsys.readouterr().err


@torch.inference_mode()
def test_proof_notices_a_wrong_weight(tmp_path):
    network = random_network(DenoisingUNet(MODEL.unet), 0)
    path = tmp_path / "expert_0.onnx"
    path.write_bytes(expert_graph(network, 16).model.SerializeToString())
    inputs = parity.expert_inputs(network, 16, (0, 1000))
    parity.prove(path, network, inputs, "fp32")
    network.get_parameter("middle_block.0.out_layers.3.bias").data[0] += 0.5
    with pytest.raises(parity.ParityError, match="nothing was published"):
        parity.prove(path, network, inputs, "fp32")


@torch.inference_mode()
def test_weight_beyond_half_precision(tmp_path):
    network = random_network(DenoisingUNet(MODEL.unet), 0)
    network.get_parameter("out.2.weight").data[0, 0, 0, 0] = 1e6
    with pytest.raises(EngineError, match="not finite as float16"):
        expert_graph(network, 16, half=True)
