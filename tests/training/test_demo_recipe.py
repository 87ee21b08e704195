"""Additions of the demo recipes to the paper: residual decoders, mild degradation, losses of detail."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import graphs
import numpy as np
import pytest
import tiny_training as tiny
import torch
from benchlib import image_pairs
from PIL import Image
from torch import nn

from moesr.export.graphs.decoder import decoder_graph
from moesr.runtime.errors import UsageError
from moesr.training.checkpoint import save_checkpoint
from moesr.training.config import AutoencoderConfig
from moesr.training.data.crops import Crops, Degradation, detail
from moesr.training.data.degradation import BlindDegradation, degrade_blind
from moesr.training.losses.losses import energy_distance, spectrum_distance
from moesr.training.networks import Autoencoder
from moesr.training.recipe import Augmentation, Recipe
from moesr.training.stages import decoder, latents
from moesr.training.stages.start import add_to_lr

FIRST_STAGE = {**tiny.TINY["model"]["decoder"], "channels": 4}
CODES = ("quantize.embedding.weight", "post_quant_conv.weight", "post_quant_conv.bias")
TOP = {"norm_groups": 0, "lr_residual": True, "fusion_level": 2}


def recipe() -> Recipe:
    """Return a recipe whose decoder predicts a residual of the LR image and is wider than its first stage."""
    return tiny.recipe(
        model={"decoder": TOP}, first_stage=FIRST_STAGE, decoder={"trainable": "decoder+lr", "batch": 2}
    )


def network(**changes) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(dataclasses.replace(recipe().model.decoder, **changes)).eval()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    of = tiny.recipe(model={"decoder": {"channels": 4}})
    return tiny.stage_1(tmp_path_factory.mktemp("experts") / "checkpoint", of)


def test_initial_residual_decoder_returns_the_lr_image():
    net, lr = network(), torch.rand(2, 3, 32, 32) * 2 - 1
    add_to_lr(net)
    with torch.no_grad():
        sr = net.decode(torch.randn(2, 3, 8, 8), lr)
    assert 0 < float((sr - lr).abs().max()) < 0.1


def test_initial_layers_keep_the_scale_of_features():
    """Otherwise the LR image and its gradient would be a thousand times smaller at the last layer."""
    seen, lr, z = [], torch.rand(2, 3, 64, 64) * 2 - 1, torch.zeros(2, 3, 16, 16)
    for started in (False, True):
        net = network(refinement="none")
        if started:
            add_to_lr(net)
        hook = net.decoder.conv_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            net.decode(z, lr)
        hook.remove()
    faint, kept = (float(features.std(dim=(2, 3)).mean()) for features in seen)
    assert 0.1 < kept < 10 and kept > 20 * faint


def test_network_without_normalisation_has_no_group_norm():
    assert not [m for m in network(refinement="none").modules() if isinstance(m, nn.GroupNorm)]


@pytest.mark.parametrize("refinement", ["none", "aff"])
@pytest.mark.parametrize("fidelity", [0.0, 1.0])
def test_graph_of_a_residual_decoder_matches_its_network(refinement, fidelity):
    net = graphs.random_network(network(refinement=refinement), 3)
    assert isinstance(net, Autoencoder)
    rng = np.random.default_rng(0)
    z, lr = (rng.normal(size=(1, 3, side, side)).astype(np.float32) for side in (8, 32))
    inputs = {"z": z, "lr": lr, "fidelity": np.array([fidelity], np.float32)}
    got = graphs.run(decoder_graph(net, 8), inputs)
    with torch.no_grad():
        want = net.decode(torch.from_numpy(z), torch.from_numpy(lr), fidelity).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_quantised_latents_are_not_quantised_again():
    net, z, lr = network(), torch.randn(1, 3, 8, 8), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        codes = net.quantize(z)
        torch.testing.assert_close(net.decode(codes, lr, quantised=True), net.decode(z, lr))
        assert not torch.allclose(net.decode(z, lr, quantised=True), net.decode(z, lr))


def test_decoder_takes_the_codes_of_its_first_stage(start, tmp_path):
    of = recipe()
    task = decoder.prepare(of, start, tiny.run(tmp_path))
    given, got = start.decoder().state_dict(), task.network.state_dict()
    assert all(torch.equal(got[key], given[key]) for key in CODES)
    assert got["decoder.conv_in.weight"].shape[0] == 2 * given["decoder.conv_in.weight"].shape[0]


def test_codes_come_from_the_first_stage_and_not_from_init(start, tmp_path):
    """The decoder starts from the weights of `init`, but decodes latents of the first stage."""
    config = dataclasses.replace(recipe().model, unet=None)
    other = Autoencoder(config.decoder).state_dict()
    init = save_checkpoint(tmp_path / "init", config, [], other)
    got = decoder.prepare(recipe(), start, tiny.run(tmp_path), init).network.state_dict()
    given = start.decoder().state_dict()
    assert all(torch.equal(got[key], given[key]) for key in CODES)
    assert torch.equal(got["decoder.conv_in.weight"], other["decoder.conv_in.weight"])


def test_decoder_wider_than_its_first_stage_trains(start, tmp_path):
    photos = tiny.crops(tiny.photographs(tmp_path / "photos"))
    decoder.train(recipe(), photos, tiny.run(tmp_path / "run"), start)
    assert len(tiny.losses(tmp_path / "run")) == 3
    codes = {tuple(code) for code in start.decoder().quantize.embedding.weight.tolist()}
    latent = latents.Triples(tmp_path / "run" / decoder.LATENTS_NAME, None)[0][3]
    assert {tuple(vector) for vector in latent.flatten(1).T.tolist()} <= codes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_stage": {**FIRST_STAGE, "codebook_size": 8}}, "codebook_size 16, first_stage 8; make them"),
        ({"first_stage": {**FIRST_STAGE, "channel_mult": [1, 2]}}, "factor 4, first_stage 2"),
        (
            {"first_stage": FIRST_STAGE, "decoder": {"trainable": "decoder"}},
            'is "decoder", expected "decoder',
        ),
    ],
)
def test_first_stage_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        tiny.recipe(**changes)


def photo(folder: Path) -> Path:
    """Return an image with noise in its lower right quarter only."""
    pixels = np.full((96, 96, 3), 128, np.uint8)
    pixels[48:, 48:] = np.random.default_rng(0).integers(0, 256, (48, 48, 3))
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder / "photo.png"


def test_most_detailed_crop_is_taken(tmp_path):
    path = photo(tmp_path)
    plain, chosen = (
        np.mean(
            [
                detail(crop.permute(1, 2, 0).numpy())
                for crop in Crops([path], 32, 0, augmentation=Augmentation(candidates=n)).crops(0, 40)
            ]
        )
        for n in (1, 4)
    )
    assert chosen > 1.5 * plain


def test_detail_is_the_mean_difference_of_neighboring_pixels():
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[::2] = 255
    assert detail(stripes) == 255.0 and detail(stripes.transpose(1, 0, 2)) == 255.0
    assert detail(np.full((8, 8, 3), 9, np.uint8)) == 0.0


def test_mild_degradation_adds_less_noise(tmp_path):
    """The image is uniformly grey, so the deviation of the result is that of the noise."""
    grey = torch.full((1, 3, 128, 128), 0.5)
    deviations = []
    for config in (BlindDegradation(4), BlindDegradation.mild(4)):
        generator = torch.Generator().manual_seed(0)
        deviations.append(np.mean([float(degrade_blind(grey, config, generator).std()) for _ in range(40)]))
    assert deviations[1] < deviations[0]


@pytest.mark.parametrize("kind", ["blind", "mild"])
def test_blind_and_mild_pairs_differ_and_are_reproducible(kind):
    hr = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    got, again = (image_pairs.degrade(hr, f"x4-{kind}", "a") for _ in range(2))
    assert got.shape == (16, 16, 3) and np.array_equal(got, again)
    assert not np.array_equal(got, image_pairs.degrade(hr, "x4-bicubic", "a"))
    assert not np.array_equal(got, image_pairs.degrade(hr, "x4-mild" if kind == "blind" else "x4-blind", "a"))


def test_samples_use_the_degradation_of_the_recipe():
    hr = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    made = {kind: Degradation(kind, 4, 0)(hr, torch.tensor([3])) for kind in ("bicubic", "blind", "mild")}
    assert len({tuple(lr.flatten().tolist()) for lr in made.values()}) == 3


def test_network_without_normalisation_keeps_brightness():
    """A brighter input gives a brighter image, whereas GroupNorm would remove the mean."""
    config = AutoencoderConfig(
        channels=8, norm_groups=0, codebook_size=0, fusion_level=None, refinement="none"
    )
    torch.manual_seed(0)
    net, z = Autoencoder(config).eval(), torch.ones(1, 3, 4, 4)
    with torch.no_grad():
        flat, brighter = (net.decoder(scale * z, {}, 1.0)[..., 4:-4, 4:-4].mean() for scale in (1.0, 3.0))
    assert abs(float(flat - brighter)) > 1e-4


def test_energy_loss_compares_amounts_of_detail_and_ignores_position():
    torch.manual_seed(0)
    texture = torch.randn(1, 3, 64, 64)
    moved, blurred = texture.roll((3, 5), (2, 3)), nn.functional.avg_pool2d(texture, 3, 1, 1)
    assert float(energy_distance(texture, texture).max()) == 0.0
    same, less = (float(energy_distance(image, texture).mean()) for image in (moved, blurred))
    assert less > 5 * same


def test_spectrum_loss_ignores_phases():
    torch.manual_seed(0)
    texture = nn.functional.avg_pool2d(torch.randn(1, 3, 66, 66), 3, 1)
    moved, faded = texture.roll((3, 5), (2, 3)), 0.5 * texture
    other = nn.functional.avg_pool2d(torch.randn(1, 3, 66, 66), 3, 1)
    same, faint = (float(spectrum_distance(image, texture)) for image in (moved, faded))
    alike, white = (float(spectrum_distance(image, texture)) for image in (other, torch.randn(1, 3, 64, 64)))
    assert same < 1e-3 and faint < 0.01 < alike < 0.8 * white


def test_spectrum_loss_of_a_flat_image_has_a_gradient():
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    spectrum_distance(flat, torch.randn(1, 3, 32, 32)).backward()
    assert flat.grad is not None and bool(flat.grad.isfinite().all())


def test_spectrum_loss_is_added_with_its_weight(start, tmp_path):
    of, totals = recipe(), []
    hr, lr = (torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8) for side in (32, 8))
    batch = [torch.arange(2), hr, lr, torch.zeros(2, 3, 8, 8)]
    for weight in (0.0, 0.5):
        stage = dataclasses.replace(of.decoder, spectrum_weight=weight)
        task = decoder.prepare(dataclasses.replace(of, decoder=stage), start, tiny.run(tmp_path))
        total, figures = task.loss(batch, 0)
        totals.append(total.item())
    assert totals[1] - totals[0] == pytest.approx(0.5 * figures["spectrum"].item(), rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_free_samples_are_decoded_without_lr_features(share, start, tmp_path):
    of = recipe()
    stage = dataclasses.replace(of.decoder, free_share=share, energy_weight=1.0)
    task = decoder.prepare(dataclasses.replace(of, decoder=stage), start, tiny.run(tmp_path))
    torch.manual_seed(0)
    hr, lr = (torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8) for side in (32, 8))
    (fusion,) = task.network.decoder.fusions.values()
    assert fusion is not None
    nn.init.normal_(fusion.get_parameter("encode_enc_3.conv2.weight"))  # initially zero
    total, figures = task.loss([torch.arange(2), hr, lr, torch.randn(2, 3, 8, 8)], 0)
    total.backward()
    seen = fusion.get_parameter("encode_enc_3.conv1.weight").grad
    assert seen is not None and bool(seen.any()) == (share == 0.0)
    assert (figures["energy"].item() > 0) == (share == 1.0)
