"""Exported graphs give the results of their networks in every arrangement."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import relative_l2
from graphs import (
    NARROW,
    PLAIN_LDM,
    TINY,
    decoder_inputs,
    expert_inputs,
    random_decoder,
    random_expert,
    run,
)
from onnx import TensorProto

from moesr.export import parity
from moesr.export.graphs.builder import BF16_OPSET, FLOATS, OPSET, BuiltGraph
from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.expert import expert_graph
from moesr.export.lowering import CPU, cut, lowering
from moesr.runtime.errors import EngineError
from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet

SIDE = 32  # side of a tile in output pixels, the smallest for which the cost model chooses Winograd
FINE = replace(CPU, strip_bytes=1 << 14, score_bytes=1 << 13, strip_tiles=24)
LOWERINGS = {
    "cpu": (CPU, 2e-5),
    "cpu-fine": (FINE, 2e-5),
    "cpu-fp16": (lowering("cpu", "fp16"), 3e-3),
    "cpu-stored": (lowering("cpu", "fp32", "fp16"), 3e-3),
    "gpu": (lowering("gpu"), 2e-5),
    "gpu-fp16": (lowering("gpu", "fp16"), 3e-3),
    "gpu-bf16": (lowering("gpu", "bf16"), 3e-2),
}


@pytest.fixture(scope="module")
def expert() -> DenoisingUNet:
    return random_expert(0, NARROW)


@pytest.fixture(scope="module")
def decoder() -> Autoencoder:
    return random_decoder(NARROW)


@pytest.fixture(scope="module", params=LOWERINGS)
def experts(request, expert) -> tuple[BuiltGraph, float]:
    choices, limit = LOWERINGS[request.param]
    with torch.inference_mode():
        return expert_graph(expert, SIDE // 4, choices), limit


@pytest.fixture(scope="module", params=LOWERINGS)
def decoders(request, decoder) -> tuple[BuiltGraph, float]:
    choices, limit = LOWERINGS[request.param]
    with torch.inference_mode():
        return decoder_graph(decoder, SIDE // 4, choices), limit


@pytest.mark.parametrize("batch", [1, 3])
def test_graph_of_an_expert_matches_its_network(batch, experts, expert):
    graph, limit = experts
    inputs = expert_inputs(batch, SIDE // 4)
    assert relative_l2(run(graph, inputs), parity.network_output(expert, inputs)) < limit


def test_graph_of_a_decoder_matches_its_network(decoders, decoder):
    """The two tiles of the batch have different fidelities."""
    graph, limit = decoders
    inputs = decoder_inputs(decoder, [1.0, 0.3], SIDE)
    got, want = run(graph, inputs), parity.network_output(decoder, inputs)
    for k in range(2):
        assert relative_l2(got[k], want[k]) < limit


def test_inputs_and_outputs_of_an_expert(experts):
    latent = ("B", 3, SIDE // 4, SIDE // 4)
    assert _boundary(experts[0]) == {"z_t": latent, "cond": latent, "t": ("B",), "eps": latent}


def test_inputs_and_outputs_of_a_decoder(decoders):
    latent, image = ("B", 3, SIDE // 4, SIDE // 4), ("B", 3, SIDE, SIDE)
    assert _boundary(decoders[0]) == {"z": latent, "lr": image, "fidelity": ("B",), "image": image}


def _boundary(graph: BuiltGraph) -> dict[str, tuple[int | str, ...]]:
    """Check that a file is valid and has the builder's float32 inputs and outputs; return their shapes."""
    onnx.checker.check_model(graph.model, full_check=True)
    wide = TensorProto.BFLOAT16 not in {t.data_type for t in graph.model.graph.initializer}
    assert [o.version for o in graph.model.opset_import if not o.domain] == [OPSET if wide else BF16_OPSET]
    said = {}
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
        said[value.name] = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
    specs = (*graph.boundary.inputs, *graph.boundary.outputs)
    assert said == {spec.name: spec.dims for spec in specs} and {s.dtype for s in specs} == {"float32"}
    return said


@torch.inference_mode()
def test_decoder_without_lr_features_has_one_input():
    network = random_decoder(PLAIN_LDM)
    graph = decoder_graph(network, 8)
    assert [spec.name for spec in graph.boundary.inputs] == [i.name for i in graph.model.graph.input] == ["z"]
    inputs = {"z": decoder_inputs(network, [1.0, 1.0], side=32)["z"]}
    assert relative_l2(run(graph, inputs), parity.network_output(network, inputs)) < 2e-5


@pytest.mark.parametrize("arrangement", LOWERINGS)
@torch.inference_mode()
def test_residual_decoder_adds_the_exact_lr_image(arrangement):
    """Like those of the demo models, the decoder adds the LR image unrounded in every precision."""
    shape = {"norm_groups": 0, "lr_residual": True, "refinement": "none"}
    network = random_decoder(replace(TINY, decoder=replace(TINY.decoder, **shape)))
    choices, limit = LOWERINGS[arrangement]
    inputs = decoder_inputs(network, [0.3, 1.0], SIDE)
    graph = decoder_graph(network, SIDE // 4, choices)
    assert relative_l2(run(graph, inputs), parity.network_output(network, inputs)) < limit


@torch.inference_mode()
def test_residual_decoder_without_lr_fusion_takes_the_lr_image_alone():
    """A first stage with `lr_residual` has no LR features to weigh, so its graph has no input `fidelity`."""
    plain = replace(PLAIN_LDM.decoder, norm_groups=0, lr_residual=True)
    network = random_decoder(replace(PLAIN_LDM, decoder=plain))
    inputs = parity.decoder_inputs(network, 8)
    graph = decoder_graph(network, 8)
    assert [spec.name for spec in graph.boundary.inputs] == list(inputs) == ["z", "lr"]
    assert relative_l2(run(graph, inputs), parity.network_output(network, inputs)) < 2e-5


@pytest.mark.parametrize("kind", ["experts", "decoders"])
def test_gpu_graphs_have_no_strips(kind, expert, decoder):
    """Graphs for GPUs have neither strips nor computations on constants; graphs for CPUs have both."""
    with torch.inference_mode():
        fine, plain = (
            expert_graph(expert, 64, choices) if kind == "experts" else decoder_graph(decoder, 16, choices)
            for choices in (FINE, lowering("gpu"))
        )
    assert _cuts(fine) and _foldable(fine)
    assert not _cuts(plain) and not _foldable(plain)
    # TensorRT refuses unnamed optional inputs at the end
    assert all(node.input[-1] for node in plain.model.graph.node)


def _cuts(graph: BuiltGraph) -> int:
    return sum(node.op_type == "Slice" for node in graph.model.graph.node)


def _foldable(graph: BuiltGraph) -> int:
    constants = {tensor.name for tensor in graph.model.graph.initializer}
    return sum(constants.issuperset(node.input) for node in graph.model.graph.node)


@torch.inference_mode()
def test_nearest_codes_are_searched_in_strips(decoder):
    graph = decoder_graph(decoder, 8, FINE)
    assert Counter(n.op_type for n in graph.model.graph.node)["ArgMin"] == 2


@pytest.mark.parametrize(
    ("total", "unit", "limit", "strip"),
    [(10, 4, None, 10), (10, 4, 40, 10), (10, 4, 39, 5), (10, 4, 3, 1), (128, 1 << 22, 1 << 25, 8)],
)
def test_strips_have_even_sizes(total, unit, limit, strip):
    assert cut(total, unit, limit) == strip


@torch.inference_mode()
def test_decoder_graph_holds_nothing_superfluous(decoders):
    """It has no FFT operator, BatchNorm, repeated constant or part of the encoder after the fused level."""
    model = decoders[0].model
    assert not {n.op_type for n in model.graph.node} & {"DFT", "STFT", "BatchNormalization", "Einsum"}
    scopes = {n.name for n in model.graph.node if "encoder" in n.name}
    assert any("encoder/down.1" in s for s in scopes) and not any("encoder/down.2" in s for s in scopes)
    weights = Counter((tuple(t.dims), t.data_type, t.raw_data) for t in model.graph.initializer)
    assert max(weights.values()) == 1


@pytest.mark.parametrize(("target", "precision"), [("cpu", "fp16"), ("gpu", "fp16"), ("gpu", "bf16")])
@torch.inference_mode()
def test_half_precision_keeps_float32_where_needed(target, precision, decoder):
    """Statistics, softmax, quantiser and frequency filter are float32; all other convolutions are half."""
    model = decoder_graph(decoder, SIDE // 4, lowering(target, precision)).model
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred}
    half, single = FLOATS[precision], TensorProto.FLOAT
    seen = Counter()
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm", "Softmax", "InstanceNormalization"):
            keeps = "/filter/" in node.name or node.op_type in ("Gemm", "Softmax", "InstanceNormalization")
            assert kinds[node.output[0]] == (single if keeps else half), node.name
            seen[node.op_type, keeps] += 1
    assert len(seen) == 7  # convolutions and matrix products of both precisions
    large = [t.data_type for t in model.graph.initializer if np.prod(t.dims) > 4096]
    assert large.count(half) > 0.8 * len(large)


@pytest.mark.parametrize("kind", ["expert", "decoder"])
@torch.inference_mode()
def test_weights_stored_in_half_precision_are_cast_once(kind, request, tmp_path):
    """A session folds the casts when it opens the file, and keeps no half-precision copy."""
    network, build = request.getfixturevalue(kind), expert_graph if kind == "expert" else decoder_graph
    graph, full = build(network, SIDE // 4, LOWERINGS["cpu-stored"][0]), build(network, SIDE // 4, CPU)
    assert len(graph.to_bytes()) < 0.57 * len(full.to_bytes())
    assert graph.macs == full.macs
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    ort.InferenceSession(graph.to_bytes(), options)
    opened = onnx.load(tmp_path / "opened.onnx").graph
    assert "Cast" not in {node.op_type for node in opened.node}
    assert TensorProto.FLOAT16 not in {tensor.data_type for tensor in opened.initializer}


@torch.inference_mode()
def test_constants_that_must_be_exact_are_stored_in_float32(decoder):
    """Half precision cannot hold the matrices of the DFT and the constants of the distances to codes."""
    model = decoder_graph(decoder, SIDE // 4, LOWERINGS["cpu-stored"][0]).model
    half = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
    cast = {n.output[0] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in half}
    exact = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and "/filter/" in n.name]
    exact += [n for n in model.graph.node if n.op_type == "Gemm"]
    assert len(cast) > 50 and len(exact) > 50
    assert not [n.name for n in exact if cast.intersection(n.input)]


@torch.inference_mode()
def test_half_precision_storage_of_half_precision_weights_is_nearly_exact(expert):
    network = random_expert(1, NARROW)
    network.load_state_dict({k: v.half().float() for k, v in network.state_dict().items()})
    inputs = expert_inputs(1, SIDE // 4)
    got = run(expert_graph(network, SIDE // 4, LOWERINGS["cpu-stored"][0]), inputs)
    # nearly, since a factor that is no power of two is folded into the projection to q, k, v
    assert relative_l2(got, parity.network_output(network, inputs)) < 1e-4


@torch.inference_mode()
def test_weight_beyond_the_range_of_half_precision():
    """Such a weight is refused in half-precision graphs; float32 graphs store it in float32."""
    network = random_expert(0)
    network.get_parameter("middle_block.0.out_layers.3.weight").data[0, 0, 0, 0] = 1e6
    with pytest.raises(EngineError, match="not finite as float16; export without --fp16"):
        expert_graph(network, SIDE // 4, lowering("cpu", "fp16"))
    inputs = expert_inputs(1, SIDE // 4)
    got = run(expert_graph(network, SIDE // 4, LOWERINGS["cpu-stored"][0]), inputs)
    assert relative_l2(got, parity.network_output(network, inputs)) < 3e-3


@torch.inference_mode()
def test_nan_weight_is_refused():
    network = random_expert(0)
    network.get_parameter("out.2.weight").data[0, 0, 0, 0] = torch.nan
    with pytest.raises(EngineError, match="expert/out is not finite as float32; train again"):
        expert_graph(network, SIDE // 4)


@pytest.mark.parametrize(("key", "fidelity"), [("image_w1", 1.0), ("image_w05", 0.5), ("image_w0", 0.0)])
@torch.inference_mode()
def test_published_decoder_matches_golden(key, fidelity, golden, published_weights):
    data = golden("decoder_c32")
    network = Autoencoder(AutoencoderConfig(channels=32, codebook_size=256)).eval()
    _load(network, published_weights("decoder_c32", "dev"))
    inputs = {"z": data["z"], "lr": data["lr_upsampled"], "fidelity": np.array([fidelity], np.float32)}
    assert data.error(key, run(decoder_graph(network, 32), inputs)) < 1e-5


@torch.inference_mode()
def test_published_expert_matches_golden(golden, published_weights):
    """The sixteen space experts are merged before they are written into the graph."""
    network, data = DenoisingUNet(UNetConfig(width=32)).eval(), golden("unet_w32")
    _load(network, published_weights("unet_w32", "dev"))
    x, t = data["x"], data["t"].astype(np.float32)
    got = run(expert_graph(network, 32), {"z_t": x[:, :3], "cond": x[:, 3:], "t": t})
    assert data.error("eps", got) < 1e-5


@pytest.mark.slow
@torch.inference_mode()
def test_full_width_decoder_matches_golden(golden, published_weights):
    network, data = Autoencoder(AutoencoderConfig()).eval(), golden("decoder_c128")
    _load(network, published_weights("decoder_c128", "dev"))
    noise = np.random.Generator(np.random.PCG64(int(data["lr_seed"]))).standard_normal((1, 3, 512, 512))
    lr = (np.clip(noise, -2, 2) / 2).astype(np.float32)
    inputs = {"z": data["z"], "lr": lr, "fidelity": np.ones(1, np.float32)}
    image = run(decoder_graph(network, 128), inputs)
    # part of this error is that of the golden's float32 norms
    assert data.error("image_every_4th", image[:, :, ::4, ::4]) < 1e-4


@pytest.mark.slow
@torch.inference_mode()
def test_full_width_expert_matches_golden(golden, published_weights):
    network, data = DenoisingUNet(UNetConfig()).eval(), golden("unet_w160")
    _load(network, published_weights("unet_w160", "dev"))
    x, t = data["x"], data["t"].astype(np.float32)
    got = run(expert_graph(network, 128), {"z_t": x[:, :3], "cond": x[:, 3:], "t": t})
    assert data.error("eps", got) < 1e-5


def _load(network: torch.nn.Module, weights: dict[str, np.ndarray]) -> None:
    network.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in weights.items()})
