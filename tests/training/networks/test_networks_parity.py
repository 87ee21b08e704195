"""The networks match the published ones: relative L2 error below 1e-5 for weights made from key names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import relative_l2
from published_networks import CHANNELS_32, load

from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet

WIDTH_32 = UNetConfig(width=32)
LIMIT = 1e-5


@pytest.mark.parametrize(
    ("stem", "config"), [("unet_w32", WIDTH_32), ("unet_w160", UNetConfig())], ids=["w32", "w160"]
)
@torch.inference_mode()
def test_unet_matches_golden(stem, config, golden, published_weights):
    data = golden(stem)
    network = load(DenoisingUNet(config), published_weights(stem, "dev"))
    x = torch.from_numpy(data["x"])
    eps = network(x[:, :3], x[:, 3:], torch.from_numpy(data["t"]))
    assert data.error("eps", eps.numpy()) < LIMIT


def test_unet_without_space_moe_loads_plain_ldm_weights(published_weights):
    load(
        DenoisingUNet(dataclasses.replace(WIDTH_32, space_experts=0)),
        published_weights("ldm_unet_w32", "dev"),
    )


@pytest.fixture(scope="module")
def decoder_c32(golden, published_weights):
    network = load(Autoencoder(CHANNELS_32), published_weights("decoder_c32", "dev"))
    return network, golden("decoder_c32")


@pytest.mark.parametrize(("key", "fidelity"), [("image_w1", 1.0), ("image_w05", 0.5), ("image_w0", 0.0)])
@torch.inference_mode()
def test_decoder_matches_golden_at_each_fidelity(key, fidelity, decoder_c32):
    network, data = decoder_c32
    z, lr = torch.from_numpy(data["z"]), torch.from_numpy(data["lr_upsampled"])
    image = network.decode(z, lr, fidelity).numpy()
    assert data.error(key, image) < LIMIT


@torch.inference_mode()
def test_encoder_matches_golden(decoder_c32):
    network, data = decoder_c32
    lr = torch.from_numpy(data["lr_upsampled"])
    assert data.error("lr_feature", network.lr_features(lr)[1].numpy()) < LIMIT
    assert relative_l2(network.encode(lr).numpy(), data["prequant"]) < LIMIT


@torch.inference_mode()
def test_quantiser_codes_match_golden(decoder_c32):
    network, data = decoder_c32
    found = [network.quantize.indices(torch.from_numpy(data[key])).numpy() for key in ("z", "prequant")]
    assert any(np.array_equal(codes, data["codes"]) for codes in found), "codes differ from the golden"


@pytest.mark.parametrize(
    ("key", "path"),
    [("aff_filter_out", "conv1.filter"), ("aff_block_out", "conv1"), ("aff_unet_out", "")],
    ids=["filter", "block", "unet"],
)
@torch.inference_mode()
def test_refinement_matches_golden(key, path, decoder_c32):
    network, data = decoder_c32
    module = network.decoder.unet_1.get_submodule(path)
    assert data.error(key, module(torch.from_numpy(data["aff_in"])).numpy()) < LIMIT


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Use at least two threads: with one, PyTorch's channels-last GroupNorm loses a digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, 2))
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def test_full_width_decoder_matches_golden(golden, published_weights, two_threads):
    data = golden("decoder_c128")
    network = load(Autoencoder(AutoencoderConfig()), published_weights("decoder_c128", "dev"))
    noise = np.random.Generator(np.random.PCG64(int(data["lr_seed"]))).standard_normal((1, 3, 512, 512))
    lr = (np.clip(noise, -2, 2) / 2).astype(np.float32)
    np.testing.assert_array_equal(lr[:, :, :4, :4], data["lr_corner"])
    image = network.decode(torch.from_numpy(data["z"]), torch.from_numpy(lr))
    assert data.error("image_every_4th", image[:, :, ::4, ::4].numpy()) < LIMIT
