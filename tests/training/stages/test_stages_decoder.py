"""Stage 2: the trained parameters, the terms of the loss, the discriminator, and LPIPS from a library."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Iterable

import pytest
import tiny_training as tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moesr.runtime.errors import UsageError
from moesr.training.checkpoint import load_checkpoint
from moesr.training.data.crops import resize_batch, to_float
from moesr.training.loop.trainer import Trainer, read_state
from moesr.training.losses.adversarial import adaptive_weight, hinge_loss
from moesr.training.networks import Autoencoder
from moesr.training.networks.discriminator import PatchDiscriminator
from moesr.training.recipe import load_recipe
from moesr.training.stages import decoder, latents
from moesr.training.stages.common import plain
from moesr.training.stages.start import pass_lr

RECIPE = tiny.recipe()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.crops(tiny.photographs(tmp_path_factory.mktemp("photos")))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.stage_1(tmp_path_factory.mktemp("experts") / "checkpoint", RECIPE)


def batch(count: int = 2) -> list[Tensor]:
    torch.manual_seed(5)
    hr = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    lr = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    return [torch.arange(count), hr, lr, torch.randn(count, 3, 8, 8)]


@pytest.mark.parametrize("trainable", ["fusion+refinement", "decoder", "decoder+lr"])
def test_only_the_configured_layers_are_trained(trainable, start, tmp_path):
    recipe = tiny.recipe(decoder={"trainable": trainable, "adversarial_weight": 0.8})
    trainer = Trainer(decoder.prepare(recipe, start, tiny.run(tmp_path)), recipe.decoder, tiny.CPU, 0)
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    trainer.advance(iter([batch()]))
    trainer.advance(iter([batch()]))  # in the first step, layers before the zero layer have no gradient
    parameters = dict(trainer.network.named_parameters())
    changed = {k for k in parameters if not torch.equal(before[k], parameters[k])}
    new = ("decoder.fusion_layer_1", "decoder.unet_1")
    lr = ("encoder.conv_in", "encoder.down.0", "encoder.down.1.block")
    prefixes = {"fusion+refinement": new, "decoder": "decoder.", "decoder+lr": ("decoder.", *lr)}[trainable]
    assert parts(changed) == parts(k for k in parameters if k.startswith(prefixes))
    assert parameters["decoder.conv_out.weight"].grad is None


def parts(names: Iterable[str]) -> set[str]:
    """Return the layers and levels that contain the parameters with these names."""
    return {".".join(name.split(".")[:4]) if "encoder.down" in name else name.split(".")[1] for name in names}


def test_initial_decoder_shows_the_lr_image():
    """Before any training, the decoder's output is close to the LR image for any latents."""
    recipe = load_recipe("ablation-decoder-aff-ffl")
    generator = torch.Generator().manual_seed(0)
    lr = torch.randint(0, 256, (6, 3, 4, 4), generator=generator, dtype=torch.uint8)
    lr = lr.repeat_interleave(4, 2).repeat_interleave(4, 3)  # areas of 16 x 16 output pixels
    hr = lr.repeat_interleave(4, 2).repeat_interleave(4, 3)
    samples = [torch.arange(6), hr, lr, torch.randn(6, 3, 16, 16, generator=generator)]
    torch.manual_seed(0)
    network = Autoencoder(recipe.model.decoder)
    decoder.start_from(Autoencoder(plain(recipe.model.decoder)), network)
    lr_up, errors = to_float(resize_batch(lr, 64, 64)), []
    for _ in range(2):
        with torch.no_grad():
            sr = network.decode(samples[3], lr_up)
        errors.append(float((to_float(hr) - sr)[4:].square().mean()))  # held-out samples only
        pass_lr(network, [part[:4] for part in samples])
    without, passed = errors
    assert passed < 0.2 * float(to_float(hr).var()) < 0.2 * without


def test_initial_decoder_equals_the_first_stage(start, tmp_path):
    """Fusion adds nothing at first, so the initial decoder is close to that of stage 1."""
    objective = decoder.prepare(RECIPE, start, tiny.run(tmp_path))
    plain = start.decoder()
    state = objective.network.state_dict()
    assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
    baseline = tiny.recipe(model={"decoder": {"refinement": "none"}})
    fused = decoder.prepare(baseline, start, tiny.run(tmp_path)).network.eval()
    fresh = Autoencoder(baseline.model.decoder).eval()
    fresh.load_state_dict({**fresh.state_dict(), **plain.state_dict()})
    z, lr = torch.randn(1, 3, 8, 8), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        want = plain.decode(z)
        started, random = ((network.decode(z, lr) - want).abs().mean() for network in (fused, fresh))
    assert started < 0.1 * random


def test_decoder_without_fusion_and_refinement_is_refused(data, start, tmp_path):
    recipe = tiny.recipe(model={"decoder": {"fusion_level": None, "refinement": "none"}})
    with pytest.raises(UsageError, match="nothing to train"):
        decoder.train(recipe, data, tiny.run(tmp_path), start)


def test_loss_is_the_weighted_sum_of_its_terms(start, tmp_path):
    stage = {"l1_weight": 2.0, "frequency_weight": 10.0, "adversarial_weight": 0.8, "adversarial_from": 1}
    objective = decoder.prepare(tiny.recipe(decoder=stage), start, tiny.run(tmp_path))
    objective.network.eval()
    total, f = objective.loss(batch(), 0)
    assert set(f) == {"l1", "ffl"}
    torch.testing.assert_close(total, 2 * f["l1"] + 10 * f["ffl"])
    total, f = objective.loss(batch(), 1)
    assert set(f) == {"l1", "ffl", "adv", "adv_weight", "critic"}
    want = 2 * f["l1"] + 10 * f["ffl"] + 0.8 * f["adv_weight"] * f["adv"] + f["critic"]
    torch.testing.assert_close(total, want)


def test_saved_weights_are_a_mixture_of_trained_and_initial_weights(data, start, tmp_path):
    decoder.train(RECIPE, data, tiny.run(tmp_path / "init"), start)
    init, made = load_checkpoint(tmp_path / "init/checkpoint"), tmp_path / "init/latents"
    states = []
    for share in (0.0, 0.5, 1.0):
        run = tiny.run(tmp_path / str(share))
        recipe = tiny.recipe(decoder={"init_share": share})
        decoder.train(recipe, None, run, start, made=made, init=init)
        states.append(load_checkpoint(run.directory / "checkpoint").decoder().state_dict())
    trained, mixed, initial = states
    before = init.decoder().state_dict()
    key = "decoder.unet_1.up2.0.weight"
    assert not torch.equal(trained[key], before[key])
    torch.testing.assert_close(mixed[key], (trained[key] + before[key]) / 2)
    for name, weight in before.items():
        if weight.is_floating_point():
            torch.testing.assert_close(initial[name], weight)


def test_saved_weights_may_be_half_precision(data, start, tmp_path):
    files = []
    for stored in ("fp32", "fp16"):
        run = tiny.run(tmp_path / stored)
        decoder.train(tiny.recipe(decoder={"stored": stored}), data, run, start)
        whole = load_checkpoint(run.directory / "checkpoint").files[1:]
        files.append({path.name: load_file(path) for path in whole})
    full, half = files
    assert full.keys() == half.keys()
    for name, state in half.items():
        for key, weight in state.items():
            if weight.is_floating_point():
                assert weight.dtype is torch.float16
                torch.testing.assert_close(weight, full[name][key].half(), rtol=0, atol=0)


def test_color_loss_is_computed_before_the_color_correction(start, tmp_path):
    """All other terms are computed after the wavelet color correction, which removes a color cast."""
    changes = {"wavelet_colors": True, "color_weight": 3.0, "frequency_weight": 0.0}
    objective = decoder.prepare(tiny.recipe(decoder=changes), start, tiny.run(tmp_path))
    objective.network.eval()
    bias = objective.network.decoder.conv_out.bias
    assert bias is not None
    losses = []
    with torch.no_grad():
        for _ in range(2):
            losses.append(objective.loss(batch(), 0))
            bias += 5.0
    (total, before), (_, after) = losses
    torch.testing.assert_close(total, before["l1"] + 3 * before["color"])
    torch.testing.assert_close(after["l1"], before["l1"], atol=1e-4, rtol=0)
    assert after["color"] > before["color"] + 3


def test_decoder_and_discriminator_get_their_own_gradients(start, tmp_path):
    """One backward pass gives the decoder the adversarial gradient and the discriminator its hinge loss's."""
    recipe = tiny.recipe(decoder={"adversarial_weight": 0.8, "l1_weight": 1.0, "frequency_weight": 0.0})
    objective = decoder.prepare(recipe, start, tiny.run(tmp_path))
    assert objective.critic is not None
    objective.network.eval()
    objective.critic.eval()  # fixed statistics make the losses below comparable
    total, figures = objective.loss(batch(), 0)
    total.backward()
    _, sr, target, _ = objective._decode(batch())
    own = hinge_loss(objective.critic(target), objective.critic(sr.detach()))
    wanted = torch.autograd.grad(own, list(objective.critic.parameters()))
    for p, want in zip(objective.critic.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-6)
    weights = [p for p in objective.network.parameters() if p.requires_grad]
    loss = (sr - target).abs().mean() - 0.8 * figures["adv_weight"] * objective.critic(sr).mean()
    wanted = torch.autograd.grad(loss, weights, allow_unused=True)
    for p, want in zip(weights, wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-6)


def test_loss_of_the_discriminator_falls(start, tmp_path):
    recipe = tiny.recipe(decoder={"adversarial_weight": 0.8, "learning_rate": 1e-3, "batch": 2})
    objective = decoder.prepare(recipe, start, tiny.run(tmp_path))
    trainer = Trainer(objective, recipe.decoder, tiny.CPU, 0)
    losses = [trainer.advance(iter([batch()]))["critic"] for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


def test_adaptive_weight_balances_the_gradients():
    layer = torch.randn(3, 4, requires_grad=True)
    x = torch.randn(5, 4)
    reconstruction = ((x @ layer.T) ** 2).mean()
    adversarial = (x @ layer.T).sum() * 0.01
    norms = [
        torch.autograd.grad(v, layer, retain_graph=True)[0].norm() for v in (reconstruction, adversarial)
    ]
    weight = adaptive_weight(reconstruction, adversarial, layer)
    torch.testing.assert_close(weight, norms[0] / (norms[1] + 1e-4))
    assert not weight.requires_grad
    assert float(adaptive_weight(reconstruction * 1e9, adversarial * 1e-9, layer)) == 1e4


@pytest.mark.parametrize(
    ("real", "fake", "loss"), [(2.0, -2.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 1.0, 2.0), (1.0, 0.0, 0.5)]
)
def test_hinge_loss(real, fake, loss):
    assert float(hinge_loss(torch.full((2, 1, 3, 3), real), torch.full((2, 1, 3, 3), fake))) == loss


def test_discriminator_has_the_layers_of_vqgan():
    network = PatchDiscriminator()
    assert network(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.stride[0]) for m in convolutions] == [
        (3, 64, 2),
        (64, 128, 2),
        (128, 256, 2),
        (256, 512, 1),
        (512, 1, 1),
    ]
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    network.eval()(image)[0, 0, 6, 6].backward()
    assert image.grad is not None
    rows = image.grad[0].abs().sum(dim=(0, 2)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70  # receptive field of one score, pixels


def lpips_recipe(weights: str):
    return tiny.recipe(decoder={"lpips_weight": 1.0, "lpips_weights": weights})


def hide_lpips(monkeypatch):
    real = importlib.import_module

    def absent(name, *args):
        if name == "lpips":
            raise ModuleNotFoundError("No module named 'lpips'")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", absent)


def test_lpips_is_refused_if_it_is_not_installed(start, tmp_path, monkeypatch):
    hide_lpips(monkeypatch)
    with pytest.raises(UsageError, match=r"pip install 'moesr\[lpips\]', .*decoder\.lpips_weight=0"):
        decoder.prepare(lpips_recipe("vgg.pth"), start, tiny.run(tmp_path))


class FakeLPIPS(nn.Module):
    """A replacement for lpips.LPIPS with one layer instead of the thirteen of VGG16."""

    def __init__(self, **options):
        super().__init__()
        assert options == {"net": "vgg", "pnet_rand": True, "verbose": False}
        self.net = nn.Sequential()
        self.net.slice1 = nn.Sequential()
        self.net.slice1.add_module("0", nn.Conv2d(3, 2, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.net.slice1(a) - self.net.slice1(b)).square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def fake_lpips(monkeypatch):
    module = types.ModuleType("lpips")
    module.LPIPS = FakeLPIPS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)


@pytest.mark.parametrize("name", ["", "absent.pth"])
def test_lpips_without_its_weights_is_refused(name, start, tmp_path, fake_lpips):
    with pytest.raises(UsageError, match=r"decoder\.lpips_weights: .* is not a file; .*lpips_weight=0"):
        decoder.prepare(lpips_recipe(name), start, tiny.run(tmp_path))


@pytest.mark.parametrize("content", ["foreign", "other"])
def test_lpips_with_other_weights_is_refused(content, start, tmp_path, fake_lpips):
    path = tmp_path / "vgg.pth"
    path.write_bytes(b"junk") if content == "foreign" else torch.save(
        {"classifier.0.weight": torch.ones(1)}, path
    )
    with pytest.raises(UsageError, match="not torchvision's VGG16 weights"):
        decoder.prepare(lpips_recipe(str(path)), start, tiny.run(tmp_path))


def test_lpips_is_added_to_the_loss(start, tmp_path, fake_lpips):
    path = tmp_path / "vgg.pth"
    weights = {"features.0.weight": torch.randn(2, 3, 1, 1), "features.0.bias": torch.randn(2)}
    torch.save({**weights, "features.2.weight": torch.ones(1), "classifier.0.weight": torch.ones(1)}, path)
    objective = decoder.prepare(lpips_recipe(str(path)), start, tiny.run(tmp_path))
    total, figures = objective.loss(batch(), 0)
    _, sr, target, _ = objective._decode(batch())
    difference = nn.functional.conv2d(sr - target, weights["features.0.weight"])
    torch.testing.assert_close(figures["lpips"], difference.square().mean())
    torch.testing.assert_close(total, figures["l1"] + figures["lpips"] + 10 * figures["ffl"])
    assert "net" not in {name.split(".")[0] for name in objective.network.state_dict()}


def test_training_resumes_with_its_discriminator_state(data, start, tmp_path, monkeypatch):
    recipe = tiny.recipe(decoder={"adversarial_weight": 0.8, "adversarial_from": 1, "steps": 4})

    def train(name, steps):
        part = dataclasses.replace(recipe, decoder=dataclasses.replace(recipe.decoder, steps=steps))
        decoder.train(part, data, tiny.run(tmp_path / name), start)
        return tiny.losses(tmp_path / name), read_state(tmp_path / name / "last.pt")

    whole, state = train("whole", 4)
    train("parts", 2)
    resumed, again = train("parts", 4)
    assert resumed == whole
    for mine, other in zip(state["modules"], again["modules"], strict=True):
        assert tiny.same(mine, other)


def test_complete_model_is_written(data, start, tmp_path):
    recipe = tiny.recipe(decoder={"val_every": 2, "val_samples": 1, "precision": "bf16"})
    decoder.train(recipe, data, tiny.run(tmp_path), start, data)
    for name in ("checkpoint", "checkpoint-best"):
        loaded = load_checkpoint(tmp_path / name)
        assert loaded.config.decoder == recipe.model.decoder
        for k in range(2):
            assert tiny.same(loaded.expert(k).state_dict(), start.expert(k).state_dict())


@pytest.mark.parametrize("made", [False, True], ids=["given", "absent"])
def test_decoder_trains_on_existing_latents_without_photographs(made, data, start, tmp_path):
    if made:
        with pytest.raises(UsageError, match=r"needs photographs \(--data\) or latents"):
            decoder.train(RECIPE, None, tiny.run(tmp_path), start)
        return
    latents.make(RECIPE, start, data, tiny.run(tmp_path), tmp_path / "latents", RECIPE.decoder.latents)
    decoder.train(RECIPE, None, tiny.run(tmp_path / "a"), start, made=tmp_path / "latents")
    decoder.train(RECIPE, data, tiny.run(tmp_path / "b"), start)
    assert tiny.losses(tmp_path / "a") == tiny.losses(tmp_path / "b")


def test_checkpoint_with_other_expert_ranges_is_refused(data, tmp_path):
    other = tiny.recipe(model={"expert_ranges": [[0, 1000]]})
    start = tiny.stage_1(tmp_path / "other", other)
    with pytest.raises(UsageError, match=r"has experts for \(\(0, 1000\),\), the recipe for"):
        decoder.prepare(RECIPE, start, tiny.run(tmp_path))


def test_fidelity_is_drawn_to_match_the_source_of_the_latent(start, tmp_path):
    """Among samples with fidelity w, a fraction 1 - w has the encoder's latent; some have w = 0 or 1."""
    stage = {"encoded_share": 0.5, "free_share": 0.2}
    objective = decoder.prepare(tiny.recipe(decoder=stage), start, tiny.run(tmp_path))
    torch.manual_seed(0)
    encoded = torch.arange(4000) % 2 == 0
    given = [torch.arange(4000), *batch(1)[1:], encoded]
    fidelity = objective._fidelity(given).flatten()
    assert ((fidelity >= 0) & (fidelity <= 1)).all()
    assert float((fidelity == 0)[encoded].float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float((fidelity == 1)[~encoded].float().mean()) == pytest.approx(0.2, abs=0.03)
    inner = (fidelity > 0) & (fidelity < 1)
    for low in (0.1, 0.4, 0.7):
        near = inner & (fidelity >= low) & (fidelity < low + 0.2)
        assert float(encoded[near].float().mean()) == pytest.approx(0.9 - low, abs=0.08)


def test_adversarial_loss_covers_only_sampled_latents_of_low_fidelity(start, tmp_path, monkeypatch):
    stage = {"encoded_share": 0.5, "adversarial_weight": 1.0}
    objective = decoder.prepare(tiny.recipe(decoder=stage), start, tiny.run(tmp_path))
    given = [*batch(4), torch.tensor([True, True, False, False])]
    fidelity = torch.tensor([0.0, 0.5, 0.9, 1.0]).reshape(4, 1, 1, 1)
    seen = []
    monkeypatch.setattr(objective, "_fidelity", lambda _: fidelity)
    monkeypatch.setattr(objective, "_adversarial", lambda sr, *_: seen.append(len(sr)) or sr.new_zeros(()))
    objective.loss(given, 0)
    fidelity.fill_(1.0)
    objective.loss(given, 0)
    assert seen == [2]


def test_mean_squared_error_is_added_to_the_loss(start, tmp_path):
    stage = {"l1_weight": 0.0, "mse_weight": 3.0, "frequency_weight": 0.0}
    objective = decoder.prepare(tiny.recipe(decoder=stage), start, tiny.run(tmp_path))
    total, figures = objective.loss(batch(), 0)
    torch.testing.assert_close(total, 3.0 * figures["mse"])
