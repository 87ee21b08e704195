"""Tensors in the layout of the library diffusers are renamed to ours, and the networks compute the same."""

from __future__ import annotations

import dataclasses

import diffusers_files as files
import numpy as np
import pytest
import torch
from conftest import relative_l2
from weights_of_names import weights

from moesr.training.config import StableDiffusionConfig, StableSRUNetConfig, TextConfig
from moesr.training.importing.diffusers_names import part_of, text_state, unet_state, vae_state
from moesr.training.networks import Autoencoder, StableSRUNet, TextEncoder
from moesr.training.weights import meta_network, state_shapes

FULL = StableDiffusionConfig()
NARROW_UNET = StableSRUNetConfig(width=32, head_channels=16, text_channels=64, structure_channels=0)
NARROW_TEXT = TextConfig(width=64, layers=3, heads=4)
LIMIT = 1e-5
LAYOUTS = {
    "unet": (unet_state, files.unet_shapes(320, 1024), StableSRUNet, FULL.unet),
    "vae": (vae_state, files.vae_shapes(128), Autoencoder, FULL.decoder),
    "text": (text_state, files.text_shapes(1024, 23), TextEncoder, FULL.text),
}


def filled(shapes: files.Shapes) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.asarray(v)) for key, v in weights(shapes, "dev").items()}


@pytest.mark.parametrize("part", LAYOUTS)
def test_every_diffusers_tensor_maps_to_one_of_ours_at_full_width(part):
    """Each tensor maps to one of ours of the same shape, and none of ours is left over."""
    convert, shapes, kind, sizes = LAYOUTS[part]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert part_of(state) == part
    got, want = state_shapes(convert(state)), state_shapes(meta_network(kind, sizes).state_dict())
    assert got == want
    if part != "text":  # its queries, keys and values are joined, and unused tensors are added
        assert len(got) == len(shapes)


def test_old_attention_names_in_an_autoencoder_are_converted():
    shapes = files.vae_shapes(32)
    old = dict(files.old_vae_names(shapes))
    assert len(old) == 16
    state = filled(shapes)
    renamed = {old.get(key, key): tensor for key, tensor in state.items()}
    want, got = vae_state(state), vae_state(renamed)
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@torch.inference_mode()
def test_converted_unet_matches_golden(golden):
    data = golden("stable_diffusion")
    network = StableSRUNet(NARROW_UNET)
    network.load_state_dict(unet_state(filled(files.unet_shapes(32, 64))))
    z, t, text = (torch.from_numpy(data[key]) for key in ("z", "t", "context"))
    assert relative_l2(network(z, t, {}, text).numpy(), data["eps"]) < LIMIT


@torch.inference_mode()
def test_converted_autoencoder_matches_golden(golden):
    data = golden("stable_diffusion")
    network = Autoencoder(dataclasses.replace(FULL.decoder, channels=32))
    network.load_state_dict(vae_state(filled(files.vae_shapes(32))))
    mean = network.encode(torch.from_numpy(data["image"])).numpy()
    assert relative_l2(mean, data["moments"][:, :4]) < LIMIT
    decoded = network.decode(torch.from_numpy(data["latent"])).numpy()
    assert relative_l2(decoded, data["decoded"]) < LIMIT


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@torch.inference_mode()
def test_converted_text_encoder_matches_golden(prefix, golden):
    """In older files the names begin with `text_model.`, and the position ids are stored too."""
    data = golden("stable_diffusion")
    state = filled(files.text_shapes(64, 2))
    state = {prefix + key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    network = TextEncoder(NARROW_TEXT)
    network.load_state_dict(text_state(state))
    got = network(torch.from_numpy(data["ids"])).numpy()[:, : data["encoded"].shape[1]]
    assert relative_l2(got, data["encoded"]) < LIMIT


def test_unknown_names_are_kept():
    state = {"down_blocks.0.motion_modules.0.weight": torch.zeros(1), "conv_in.weight": torch.zeros(1)}
    assert list(unet_state(state)) == ["down_blocks.0.motion_modules.0.weight", "input_blocks.0.0.weight"]
    assert part_of({"layer.weight": torch.zeros(1)}) is None
