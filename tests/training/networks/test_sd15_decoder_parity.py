"""The frequency-compensated decoder for Stable Diffusion 1.5 matches the published network."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from published_networks import load

from moesr.training.config import KL_AUTOENCODER, KL_F8
from moesr.training.networks import Autoencoder
from moesr.training.weights import meta_network

LIMIT = 1e-5
NARROW = dataclasses.replace(KL_F8, channels=32)


@pytest.fixture(scope="module")
def narrow(golden, published_weights):
    return load(Autoencoder(NARROW), published_weights("sd15_decoder_c32", "dev")), golden("sd15_decoder_c32")


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


@pytest.mark.parametrize("shape", ["", "_wide"])
@torch.inference_mode()
def test_decoder_matches_golden(narrow, shape):
    network, data = narrow
    seen = {}
    hook = network.decoder.unet_1.register_forward_hook(lambda _, x, out: seen.update(before=x[0], after=out))
    image = network.decode(tensor(data[f"z{shape}"])).numpy()
    hook.remove()
    assert data.error(f"decoded{shape}", image) < LIMIT
    for part in ("before", "after") if shape else ():
        assert data.error(f"{part}_wide", seen[part][:, ::4].numpy()) < LIMIT
    scaled = tensor(data[f"latent{shape}"])
    assert data.error(f"decoded{shape}", network.decode(scaled).numpy()) > 0.5  # it takes latents unscaled
    slightly = network.decode(scaled / 0.1825).numpy()
    assert data.error(f"decoded{shape}", slightly) > 5e-4


@pytest.mark.parametrize("shape", ["", "_wide"])
@torch.inference_mode()
def test_decoder_without_refinement_matches_golden(narrow, shape):
    network, data = narrow
    z, key = tensor(data[f"z{shape}"]), f"decoded_plain{shape}"
    assert data.error(key, network.decode(z, refined=False).numpy()) < LIMIT
    assert data.error(key, network.decode(z).numpy()) > 0.5


@torch.inference_mode()
def test_encoder_matches_golden(narrow):
    network, data = narrow
    for shape in ("", "_wide"):
        moments = network.quant_conv(network.encoder(tensor(data[f"image{shape}"])))
        assert data.error(f"moments{shape}", moments.numpy()) < LIMIT
    sample = network.sample(tensor(data["image"]), tensor(data["noise"]))
    assert data.error("sample", sample.numpy()) < LIMIT


@pytest.mark.parametrize(("key", "path"), [("tiny_mid", "mid.block_1"), ("tiny_unet", "unet_1")])
@torch.inference_mode()
def test_normalisation_of_small_features_matches_golden(narrow, key, path):
    network, data = narrow
    module = network.decoder.get_submodule(path)
    assert data.error(f"{key}_out", module(tensor(data[key])).numpy()) < LIMIT


def test_parameters_are_those_of_the_published_networks():
    whole, plain = (meta_network(Autoencoder, config) for config in (KL_F8, KL_AUTOENCODER))
    counts = [sum(p.numel() for p in n.parameters()) for n in (whole, whole.decoder.unet_1, plain.encoder)]
    assert [round(count / 1e6, 3) for count in counts] == [89.893, 6.239, 34.164]
    assert len(whole.state_dict()) == 504


@pytest.mark.slow
@torch.inference_mode()
def test_full_width_matches_golden(golden, published_weights):
    network = load(Autoencoder(KL_F8), published_weights("sd15_decoder_c128", "dev"))
    data = golden("sd15_decoder_c128")
    moments = network.quant_conv(network.encoder(tensor(data["image"])))
    assert data.error("moments", moments.numpy()) < LIMIT
    assert data.error("decoded", network.decode(tensor(data["z"])).numpy()) < LIMIT
    assert data.error("decoded_plain", network.decode(tensor(data["z"]), refined=False).numpy()) < LIMIT
