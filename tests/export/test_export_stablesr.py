"""StableSR's graphs give the results of its networks in every arrangement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import relative_l2
from graphs import random_network, run
from stablesr import NARROW, SALT, load

from moesr.export import parity
from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.stablesr import (
    LatentDecoder,
    LatentEncoder,
    StableSRExpert,
    encoder_graph,
    stablesr_expert_graph,
)
from moesr.export.lowering import CPU, lowering
from moesr.runtime.engine.graph_io import DECODER, ENCODER, boundary_of
from moesr.training.networks import Autoencoder, StableSRUNet, StructureEncoder

# sides in latent pixels: of a tile, and of an image to encode or decode
SIDE, CODED, SCALE = 16, 8, NARROW.latent_scale
FINE = replace(CPU, strip_bytes=1 << 16, score_bytes=1 << 15, strip_tiles=24)
LOWERINGS = {
    "cpu": (CPU, 2e-5),
    "cpu-fine": (FINE, 2e-5),
    "cpu-stored": (lowering("cpu", "fp32", "fp16"), 3e-3),
    "gpu": (lowering("gpu"), 2e-5),
    "gpu-fp16": (lowering("gpu", "fp16"), 5e-3),
}


@pytest.fixture(scope="module")
def expert() -> StableSRExpert:
    unet = random_network(StableSRUNet(NARROW.unet), 0)
    structure = random_network(StructureEncoder(NARROW.structure), 1)
    text = torch.randn(1, NARROW.text.tokens, NARROW.text.width, generator=torch.Generator().manual_seed(2))
    return StableSRExpert(unet, structure, text, "v").eval()


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return random_network(Autoencoder(NARROW.decoder), 3)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def expert_inputs(batch: int) -> dict[str, np.ndarray]:
    z_t, cond = normal(4, 2, batch, 4, SIDE, SIDE)
    return {"z_t": z_t, "cond": cond, "t": np.array([999, 7, 400], np.float32)[:batch]}


def image(seed: int, batch: int) -> np.ndarray:
    return np.clip(normal(seed, batch, 3, 8 * CODED, 8 * CODED) / 2, -1, 1)


@pytest.mark.parametrize("choices", LOWERINGS)
@torch.inference_mode()
def test_graph_of_the_expert_matches_its_network(choices, expert):
    choice, limit = LOWERINGS[choices]
    graph = stablesr_expert_graph(expert, SIDE, choice)
    assert graph.boundary == boundary_of("expert_0", 8 * SIDE, 4, 8, "v", with_latent=True)
    for batch in (1, 3):
        inputs = expert_inputs(batch)
        assert relative_l2(run(graph, inputs), parity.network_output(expert, inputs)) < limit


@pytest.mark.parametrize("choices", ["cpu", "gpu-fp16"])
@torch.inference_mode()
def test_graph_with_two_prompts_matches_its_network(choices, expert):
    """Each tile has its own prompt."""
    choice, limit = LOWERINGS[choices]
    both = StableSRExpert(expert.unet, expert.structure, torch.cat([expert.text, -expert.text]), "v").eval()
    graph = stablesr_expert_graph(both, SIDE, choice)
    assert graph.boundary == boundary_of("expert_0", 8 * SIDE, 4, 8, "v", with_latent=True, with_prompt=True)
    inputs = expert_inputs(3)
    got = run(graph, inputs | {"prompt": np.array([1, 0, 1], np.float32)})
    assert (
        relative_l2(got, both(*map(torch.from_numpy, inputs.values()), torch.tensor([1, 0, 1])).numpy())
        < limit
    )
    assert relative_l2(got[1:2], expert(*(torch.from_numpy(v[1:2]) for v in inputs.values())).numpy()) < limit
    assert relative_l2(got[:1], expert(*(torch.from_numpy(v[:1]) for v in inputs.values())).numpy()) > 1e-3


@pytest.mark.parametrize("choices", LOWERINGS)
@torch.inference_mode()
def test_graph_of_the_encoder_matches_its_network(choices, autoencoder):
    choice, limit = LOWERINGS[choices]
    network = LatentEncoder(autoencoder, SCALE).eval()
    graph = encoder_graph(network, CODED, choice)
    assert graph.boundary == boundary_of(ENCODER, 8 * CODED, 4, 8)
    inputs = {"image": image(5, 2), "noise": normal(6, 2, 4, CODED, CODED)}
    assert relative_l2(run(graph, inputs), parity.network_output(network, inputs)) < limit


@pytest.mark.parametrize("choices", LOWERINGS)
@torch.inference_mode()
def test_graph_of_the_decoder_matches_its_network(choices, autoencoder):
    """Each tile has its own fidelity."""
    choice, limit = LOWERINGS[choices]
    network = LatentDecoder(autoencoder, SCALE).eval()
    graph = decoder_graph(autoencoder, CODED, choice, SCALE)
    assert graph.boundary == boundary_of(DECODER, 8 * CODED, 4, 8)
    fidelity = np.array([0.5, 1.0, 0.0], np.float32)
    inputs = {"z": normal(7, 3, 4, CODED, CODED), "lr": image(8, 3), "fidelity": fidelity}
    got = run(graph, inputs)
    assert relative_l2(got, parity.network_output(network, inputs)) < limit
    with_none = autoencoder.decode(torch.from_numpy(inputs["z"][2:]) / SCALE).numpy()
    assert relative_l2(got[2:], with_none) < max(limit, 1e-4)


@torch.inference_mode()
def test_graph_holds_the_encoded_text(expert):
    """It holds the keys and values of the text, but not the layers that compute them."""
    graph = stablesr_expert_graph(expert, SIDE)
    layers = [m for m in expert.unet.modules() if type(m).__name__ == "CrossAttention"]
    text_layers = [layer for layer in layers if layer.to_k.in_features == NARROW.text.width]
    shapes = [tuple(tensor.dims) for tensor in graph.model.graph.initializer]
    for layer in text_layers:
        head = layer.to_k.out_features // layer.heads
        assert (1, layer.heads, head, NARROW.text.tokens) in shapes
    other = StableSRExpert(expert.unet, expert.structure, -expert.text, "v").eval()
    inputs = expert_inputs(1)
    moved = relative_l2(run(stablesr_expert_graph(other, SIDE), inputs), run(graph, inputs))
    assert moved > 1e-3


@torch.inference_mode()
def test_large_variances_are_clamped(autoencoder):
    network = LatentEncoder(autoencoder, SCALE).eval()
    bias = autoencoder.quant_conv.bias
    before = bias.clone()
    inputs = {"image": image(9, 1), "noise": normal(10, 1, 4, CODED, CODED)}
    try:
        bias[4:] += 1000.0
        got = run(encoder_graph(network, CODED), inputs)
    finally:
        bias.copy_(before)
    assert relative_l2(got, SCALE * np.exp(10.0) * inputs["noise"]) < 1e-3


@torch.inference_mode()
def test_graphs_match_the_published_networks(golden, published_weights):
    """The inputs are a tile of the golden canvas; other tests compare the networks with the goldens."""
    networks = {
        name: load(f"{name}_narrow", published_weights(f"stablesr_{name}_narrow", SALT))
        for name in ("unet", "structcond")
    }
    data = golden("stablesr_loop")
    text = torch.from_numpy(data["context"])
    network = StableSRExpert(networks["unet"], networks["structcond"], text, "eps").eval()
    inputs = {
        "z_t": data["canvas.x_T"][..., :16, :16].copy(),
        "cond": data["canvas.struct_latent"][..., :16, :16].copy(),
        "t": np.array([999], np.float32),
    }
    got = run(stablesr_expert_graph(network, 16), inputs)
    assert relative_l2(got, network(*map(torch.from_numpy, inputs.values())).numpy()) < 1e-5
