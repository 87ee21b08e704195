"""StableSR's networks and loops match the published ones for weights generated from key names."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import relative_l2
from stablesr import FULL, NARROW, SALT, Denoiser, Tiled, load, published_weights, sample

from moesr.runtime.sampling.schedule import Spacing, step_table

LIMIT, LOOP_LIMIT = 1e-5, 1e-4


@pytest.fixture(scope="module")
def narrow(request):
    """Return a function that loads a narrow network once: `narrow("unet")`."""
    weights, loaded = request.getfixturevalue("published_weights"), {}

    def get(network: str) -> torch.nn.Module:
        if network not in loaded:
            loaded[network] = load(f"{network}_narrow", weights(f"stablesr_{network}_narrow", SALT))
        return loaded[network]

    return get


def structure_of(data) -> dict[int, torch.Tensor]:
    keys = [key for key in data if key.startswith("struct.")]
    return {int(key.removeprefix("struct.")): torch.from_numpy(data[key]) for key in keys}


def normal(seed: int, *shape: int) -> torch.Tensor:
    draw = np.random.Generator(np.random.PCG64(int(seed)))
    return torch.from_numpy(draw.standard_normal(shape).astype(np.float32))


@torch.inference_mode()
def test_unet_matches_golden(narrow, golden):
    data = golden("stablesr_unet")
    z, t, text = (torch.from_numpy(data[key]) for key in ("x", "t", "context"))
    out = narrow("unet")(z, t, structure_of(data), text)
    assert data.error("out", out.numpy()) < LIMIT


@torch.inference_mode()
def test_parts_of_the_unet_match_golden(narrow, golden):
    data, network, found = golden("stablesr_unet"), narrow("unet"), {}
    parts = {
        "mid.spade.out": "input_blocks.1.0.spade",
        "mid.resblock.out": "input_blocks.1.0",
        "mid.input_block1.out": "input_blocks.1",
        "mid.middle.out": "middle_block",
    }

    def keep(key: str):
        return lambda module, inputs, output: found.update({key: output.numpy()})

    hooks = [network.get_submodule(path).register_forward_hook(keep(key)) for key, path in parts.items()]
    z, t, text = (torch.from_numpy(data[key]) for key in ("x", "t", "context"))
    network(z, t, structure_of(data), text)
    for hook in hooks:
        hook.remove()
    for key in parts:
        assert data.error(key, found[key][:1]) < LIMIT, key


@torch.inference_mode()
def test_one_text_is_used_for_a_whole_batch(narrow, golden):
    data, network = golden("stablesr_unet"), narrow("unet")
    z, t, text = (torch.from_numpy(data[key]) for key in ("x", "t", "context"))
    structure = structure_of(data)
    both = network(z, t, structure, text[:1])
    each = network(z, t, structure, text[:1].repeat(len(z), 1, 1))
    assert relative_l2(both.numpy(), each.numpy()) < 1e-6


@pytest.mark.parametrize("case", ["a", "b"])
@torch.inference_mode()
def test_structure_encoder_matches_golden(case, narrow, golden):
    data = golden("stablesr_structcond")
    x, t = (torch.from_numpy(data[f"{case}.{key}"]) for key in ("x", "t"))
    features = narrow("structcond")(x, t)
    assert sorted(features) == sorted(int(key.split(".")[2]) for key in data if f"{case}.out" in key)
    for width, feature in features.items():
        assert data.error(f"{case}.out.{width}", feature.numpy()) < LIMIT


@torch.inference_mode()
def test_text_encoder_matches_golden(narrow, golden):
    data, network = golden("stablesr_text"), narrow("text")
    out = network(torch.from_numpy(data["ids"]))
    assert data.error("out", out.numpy()) < LIMIT


@torch.inference_mode()
def test_prompts_are_the_published_ones(narrow, golden):
    data, network, text = golden("stablesr_text"), narrow("text"), FULL.text
    prompts = (text.prompt, text.guided_prompt, text.negative_prompt)
    for prompt, key in zip(prompts, ("empty", "positive", "negative"), strict=True):
        ids = data[f"ids.{key}"]
        assert ids[: len(prompt)].tolist() == list(prompt)
        assert not ids[len(prompt) :].any()
    encoded = [network.encode(prompt) for prompt in prompts]
    encoded.append(network(torch.from_numpy(data["ids.random"])[None]))
    assert data.error("out", torch.cat(encoded).numpy()) < LIMIT


@torch.inference_mode()
def test_autoencoder_latents_and_features_match_golden(narrow, golden):
    data, network = golden("stablesr_vae_cfw"), narrow("vae_cfw")
    image, noise = torch.from_numpy(data["image"]), torch.from_numpy(data["noise"])
    latent = NARROW.latent_scale * network.sample(image, noise)
    assert relative_l2(latent.numpy(), data["latent"]) < LIMIT
    assert relative_l2(network.encode(image).numpy(), data["moments"][:, :4]) < LIMIT
    features = network.lr_features(image)
    assert sorted(features) == [1, 2]
    for level, feature in features.items():
        assert data.error(f"fea_level{level}", feature.numpy()) < LIMIT


@torch.inference_mode()
def test_log_variance_is_clamped(narrow, golden):
    data, network = golden("stablesr_vae_cfw"), narrow("vae_cfw")
    image, noise = torch.from_numpy(data["image"]), torch.from_numpy(data["noise"])
    bias = network.quant_conv.bias
    before = bias.clone()
    bias[4:] += 1000.0
    try:
        spread = network.sample(image, noise) - network.sample(image, 0 * noise)
    finally:
        bias.copy_(before)
    assert relative_l2(spread.numpy(), np.exp(10) * data["noise"]) < LIMIT


@pytest.mark.parametrize(("key", "fidelity"), [("image_w0", 0.0), ("image_w05", 0.5), ("image_w1", 1.0)])
@torch.inference_mode()
def test_decoder_matches_golden(key, fidelity, narrow, golden):
    data, network = golden("stablesr_vae_cfw"), narrow("vae_cfw")
    z, lr = torch.from_numpy(data["z"]), torch.from_numpy(data["image"])
    image = network.decode(z, lr, fidelity)
    assert data.error(key, image.numpy()) < LIMIT
    if fidelity == 0:
        assert relative_l2(network.decode(z).numpy(), image.numpy()) < 1e-6


def table_of(steps: int, eta: float, spacing: Spacing):
    return step_table(dataclasses.replace(FULL.schedule, spacing=spacing), steps, eta, FULL.expert_ranges)


def denoiser(narrow, data, guided: bool) -> Denoiser:
    negative, scale = (data["negative_context"], float(data["cfg_scale"])) if guided else (None, 1.0)
    return Denoiser(narrow("unet"), narrow("structcond"), data["context"], negative, scale)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@torch.inference_mode()
def test_ddpm_loop_matches_golden(prediction, guided, narrow, golden):
    data = golden("stablesr_loop")
    table = table_of(int(data["steps"]), 1.0, "linspace")
    np.testing.assert_array_equal(table.t[::-1], data["timesteps"])
    model, latent = denoiser(narrow, data, guided), data["struct_latent"]
    trace = sample(model, data["x_T"], latent, data["noise"], table, prediction)
    key = f"{prediction}.cfg.x_0" if guided else f"{prediction}.x_0"
    assert relative_l2(trace[-1], data[key]) < LOOP_LIMIT
    if not guided:
        assert relative_l2(np.concatenate(trace[:-1]), data[f"{prediction}.trace"]) < LOOP_LIMIT


@pytest.mark.parametrize("prediction", ["eps", pytest.param("v", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_ddpm_loop_over_tiles_matches_golden(prediction, narrow, golden):
    data = golden("stablesr_loop")
    table = table_of(int(data["steps"]), 1.0, "linspace")
    model = Tiled(denoiser(narrow, data, False), tile=16, overlap=8)
    x_T, latent, noise = (data[f"canvas.{key}"] for key in ("x_T", "struct_latent", "noise"))
    trace = sample(model, x_T, latent, noise, table, prediction)
    assert relative_l2(trace[-1], data[f"{prediction}.canvas.x_0"]) < LOOP_LIMIT


def test_sampling_starts_from_the_noised_latent(golden):
    data, alpha_bar = golden("stablesr_loop"), FULL.schedule.alpha_bar[-1]
    assert FULL.init == "latent"
    noised = np.sqrt(alpha_bar) * data["struct_latent"] + np.sqrt(1 - alpha_bar) * data["start_noise"]
    assert relative_l2(noised, data["x_T"]) < 1e-6


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@torch.inference_mode()
def test_ddim_loop_matches_golden(prediction, guided, narrow, golden):
    data = golden("stablesr_ddim")
    table = table_of(int(data["steps"]), float(data["eta"]), "linspace_leading")
    np.testing.assert_array_equal(table.t[::-1], data["model_timesteps"])
    model, latent = denoiser(narrow, data, guided), data["struct_latent"]
    trace = sample(model, data["x_T"], latent, data["noise"], table, prediction)
    key = f"{prediction}.cfg.x_0" if guided else f"{prediction}.x_0"
    assert relative_l2(trace[-1], data[key]) < LOOP_LIMIT


def test_tile_weights_match_golden(golden):
    data = golden("stablesr_schedule")
    column, row = published_weights(64)
    weights, corner = np.outer(column, row), data["tile_weights_64.corner8"]
    np.testing.assert_allclose(weights[:8, :8] / weights[0, 0], corner / corner[0, 0], rtol=1e-9)
    for ours, theirs in ((column, "column"), (row, "row")):
        profile = data[f"tile_weights_64.{theirs}"]
        np.testing.assert_allclose(ours / ours.max(), profile / profile.max(), rtol=1e-9)


@pytest.mark.slow
@torch.inference_mode()
def test_full_width_unet_matches_golden(golden, published_weights):
    data = golden("stablesr_unet")
    network = load("unet_full", published_weights("stablesr_unet_full", SALT))
    seeds = zip(data["full.struct_seeds"], (64, 32, 16, 8), strict=True)
    structure = {side: normal(seed, 1, 256, side, side) for seed, side in seeds}
    text = normal(data["full.context_seed"], 1, 77, 1024)
    out = network(
        normal(data["full.x_seed"], 1, 4, 64, 64), torch.from_numpy(data["full.t"]), structure, text
    )
    assert data.error("full.out", out.numpy()) < LIMIT


@pytest.mark.slow
@torch.inference_mode()
def test_full_width_structure_encoder_matches_golden(golden, published_weights):
    data = golden("stablesr_structcond")
    network = load("structcond_full", published_weights("stablesr_structcond_full", SALT))
    features = network(normal(data["full.x_seed"], 1, 4, 64, 64), torch.from_numpy(data["full.t"]))
    for side, every in ((64, 4), (32, 2), (16, 1), (8, 1)):
        got = features[side][:, ::4, ::every, ::every].numpy()
        assert data.error(f"full.out.{side}", got) < LIMIT


@pytest.mark.slow
@torch.inference_mode()
def test_full_width_text_encoder_matches_golden(golden, published_weights):
    data = golden("stablesr_text")
    network = load("text_full", published_weights("stablesr_text_full", SALT))
    text = FULL.text
    prompts = (text.prompt, text.guided_prompt, text.negative_prompt)
    encoded = torch.cat([network.encode(prompt) for prompt in prompts])
    assert data.error("full.out", encoded[..., ::8].numpy()) < LIMIT
