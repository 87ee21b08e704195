"""Stage 2: the set of latents, what trains, the adversarial terms, LPIPS from a library."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types

import pytest
import tiny_training as tiny
import torch
from safetensors import safe_open
from torch import Tensor, nn

from moesr.runtime.errors import InputError, UsageError
from moesr.training.adversarial import adaptive_weight, hinge_loss
from moesr.training.checkpoint import load_checkpoint
from moesr.training.networks.discriminator import PatchDiscriminator
from moesr.training.stages import decoder, latents
from moesr.training.stages.common import degradation
from moesr.training.trainer import Trainer, read_state

RECIPE = tiny.recipe()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.crops(tiny.photographs(tmp_path_factory.mktemp("photos")))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return tiny.stage_1(tmp_path_factory.mktemp("experts") / "checkpoint", RECIPE)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)
    monkeypatch.setattr(latents, "BATCH", 2)


def batch(count: int = 2) -> list[Tensor]:
    torch.manual_seed(5)
    hr = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    lr = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    return [torch.arange(count), hr, lr, torch.randn(count, 3, 8, 8)]


def make(data, start, directory, recipe=RECIPE):
    latents.make(recipe, start, data, tiny.run(directory), directory, recipe.decoder.latents)


def test_latents_are_made_once_and_resumed(data, start, tmp_path, small_shards):
    make(data, start, tmp_path)
    shards = sorted(tmp_path.glob("shard_*"))
    assert [p.name for p in shards] == [f"shard_{i:05d}.safetensors" for i in range(3)]
    before = [p.read_bytes() for p in shards]
    stamps = [p.stat().st_mtime_ns for p in shards]
    shards[1].unlink()
    shards[2].write_bytes(before[2][:100])  # as if an older version had been cut off
    with pytest.raises(InputError, match=r"2 of 3 shards are missing; run moesr-train latents again"):
        latents.Triples(tmp_path, 0)
    make(data, start, tmp_path)
    assert [p.read_bytes() for p in shards] == before
    assert shards[0].stat().st_mtime_ns == stamps[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.json", *(p.name for p in shards)]


def test_triples_belong_together(data, start, tmp_path, small_shards):
    make(data, start, tmp_path)
    triples = latents.Triples(tmp_path, None)
    for number in range(5):
        index, hr, lr, z = triples[number]
        assert int(index) == number
        assert torch.equal(hr, data.crop(number))
        assert torch.equal(lr, degradation(RECIPE)(hr[None], index[None])[0])
        assert z.shape == (3, 8, 8) and z.dtype == torch.float32
    with safe_open(tmp_path / "shard_00002.safetensors", framework="pt") as file:
        assert {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()} == {  # noqa: SIM118
            "lr": (1, 3, 8, 8),
            "latent": (1, 3, 8, 8),
            "hr": (1, 3, 32, 32),
        }
    drawn = latents.Triples(tmp_path, 0)
    assert len({drawn[i][3].sum().item() for i in range(40)}) == 5
    assert torch.equal(drawn[7][3], latents.Triples(tmp_path, 0)[7][3])


def test_a_latent_does_not_depend_on_its_batch(data, start, tmp_path, small_shards, monkeypatch):
    make(data, start, tmp_path / "two")
    monkeypatch.setattr(latents, "BATCH", 1)
    make(data, start, tmp_path / "one")
    for number in range(5):
        torch.testing.assert_close(
            *(latents.Triples(tmp_path / name, None)[number][3] for name in ("one", "two")), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"latents": 6}}, "triples is 5, expected 6"),
        ({"degradation": "blind"}, "degradation is 'bicubic', expected 'blind'"),
        ({"decoder": {"latent_steps": 3}}, "steps is 2, expected 3"),
        ({"seed": 1}, "seed is 0, expected 1"),
    ],
    ids=["count", "degradation", "steps", "seed"],
)
def test_latents_of_something_else_are_refused(changes, message, data, start, tmp_path):
    make(data, start, tmp_path)
    with pytest.raises(UsageError, match=message):
        make(data, start, tmp_path, tiny.recipe(**changes))
    with pytest.raises(UsageError, match=message):
        latents.open_set(tmp_path, tiny.recipe(**changes), start)


def test_too_many_sampler_steps_are_refused(data, start, tmp_path):
    with pytest.raises(UsageError, match=r"decoder\.latent_steps: steps must be in 1\.\.1000"):
        make(data, start, tmp_path, tiny.recipe(decoder={"latent_steps": 1001}))


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["absent", "broken", "empty"])
def test_damaged_description_is_refused(content, start, tmp_path):
    if content is not None:
        (tmp_path / "set.json").write_text(content)
    with pytest.raises(InputError, match="not a set of latents"):
        latents.open_set(tmp_path, RECIPE, start)


@pytest.mark.parametrize("trainable", ["fusion+refinement", "decoder"])
def test_only_what_is_asked_for_trains(trainable, start, tmp_path):
    recipe = tiny.recipe(decoder={"trainable": trainable, "adversarial_weight": 0.8})
    trainer = Trainer(decoder.prepare(recipe, start, tiny.run(tmp_path)), recipe.decoder, tiny.CPU, 0)
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    trainer.advance(iter([batch()]))
    trainer.advance(iter([batch()]))  # the first step cannot reach what the zero layer hides
    parameters = dict(trainer.network.named_parameters())
    changed = {k.split(".")[0] + "." + k.split(".")[1] for k in parameters if not torch.equal(before[k], parameters[k])}
    new = {"decoder.fusion_layer_1", "decoder.unet_1"}
    if trainable == "decoder":
        assert changed == {k.split(".")[0] + "." + k.split(".")[1] for k in parameters if k.startswith("decoder.")}
    else:
        assert changed == new
    assert parameters["decoder.conv_out.weight"].grad is None


def test_network_starts_as_the_first_stage(start, tmp_path):
    """Fusion adds nothing at first, so the decoder begins close to where stage 1 left it."""
    task = decoder.prepare(RECIPE, start, tiny.run(tmp_path))
    plain = start.decoder()
    state = task.network.state_dict()
    assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
    baseline = tiny.recipe(model={"decoder": {"refinement": "none"}})
    fused = decoder.prepare(baseline, start, tiny.run(tmp_path)).network
    assert fused.decoder.fusion is not None
    for p in (fused.decoder.fusion.encode_enc_3.conv2.weight, fused.decoder.fusion.encode_enc_3.conv2.bias):
        assert p is not None
    z, lr = torch.randn(1, 3, 8, 8), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        fused.decoder.fusion.encode_enc_3.conv2.bias.zero_()
        passed = fused.decode(z, lr) - plain.decode(z)
        fused.decoder.fusion.encode_enc_3.conv2.weight.normal_()
        moved = fused.decode(z, lr) - plain.decode(z)
    assert passed.abs().mean() < 0.5 * moved.abs().mean()


def test_baseline_decoder_has_nothing_new_to_train(data, start, tmp_path):
    recipe = tiny.recipe(model={"decoder": {"fusion_level": None, "refinement": "none"}})
    with pytest.raises(UsageError, match="nothing to train"):
        decoder.train(recipe, data, tiny.run(tmp_path), start)


def test_loss_adds_its_terms_with_their_weights(start, tmp_path):
    stage = {"l1_weight": 2.0, "frequency_weight": 10.0, "adversarial_weight": 0.8, "adversarial_from": 1}
    task = decoder.prepare(tiny.recipe(decoder=stage), start, tiny.run(tmp_path))
    task.network.eval()
    total, f = task.loss(batch(), 0)
    assert set(f) == {"l1", "ffl"}
    torch.testing.assert_close(total, 2 * f["l1"] + 10 * f["ffl"])
    total, f = task.loss(batch(), 1)
    assert set(f) == {"l1", "ffl", "adv", "adv_weight", "critic"}
    want = 2 * f["l1"] + 10 * f["ffl"] + 0.8 * f["adv_weight"] * f["adv"] + f["critic"]
    torch.testing.assert_close(total, want)


def test_each_player_gets_its_own_gradient(start, tmp_path):
    """One backward pass trains both: the decoder against the discriminator, the discriminator by the hinge loss."""
    recipe = tiny.recipe(decoder={"adversarial_weight": 0.8, "l1_weight": 1.0, "frequency_weight": 0.0})
    task = decoder.prepare(recipe, start, tiny.run(tmp_path))
    assert task.critic is not None
    task.network.eval()
    task.critic.eval()  # fixed statistics make the losses below comparable
    total, figures = task.loss(batch(), 0)
    total.backward()
    sr, target, _ = task._decode(batch())
    own = hinge_loss(task.critic(target), task.critic(sr.detach()))
    wanted = torch.autograd.grad(own, list(task.critic.parameters()))
    for p, want in zip(task.critic.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-6)
    weights = [p for p in task.network.parameters() if p.requires_grad]
    loss = (sr - target).abs().mean() - 0.8 * figures["adv_weight"] * task.critic(sr).mean()
    wanted = torch.autograd.grad(loss, weights, allow_unused=True)
    for p, want in zip(weights, wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-6)


def test_discriminator_learns_to_tell(start, tmp_path):
    recipe = tiny.recipe(decoder={"adversarial_weight": 0.8, "learning_rate": 1e-3, "batch": 2})
    task = decoder.prepare(recipe, start, tiny.run(tmp_path))
    trainer = Trainer(task, recipe.decoder, tiny.CPU, 0)
    losses = [trainer.advance(iter([batch()]))["critic"] for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


def test_adaptive_weight_balances_the_gradients():
    layer = torch.randn(3, 4, requires_grad=True)
    x = torch.randn(5, 4)
    reconstruction = ((x @ layer.T) ** 2).mean()
    adversarial = (x @ layer.T).sum() * 0.01
    norms = [torch.autograd.grad(v, layer, retain_graph=True)[0].norm() for v in (reconstruction, adversarial)]
    weight = adaptive_weight(reconstruction, adversarial, layer)
    torch.testing.assert_close(weight, norms[0] / (norms[1] + 1e-4))
    assert not weight.requires_grad
    assert float(adaptive_weight(reconstruction * 1e9, adversarial * 1e-9, layer)) == 1e4


@pytest.mark.parametrize(
    ("real", "fake", "loss"), [(2.0, -2.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 1.0, 2.0), (1.0, 0.0, 0.5)]
)
def test_hinge_loss(real, fake, loss):
    assert float(hinge_loss(torch.full((2, 1, 3, 3), real), torch.full((2, 1, 3, 3), fake))) == loss


def test_discriminator_is_that_of_vqgan():
    network = PatchDiscriminator()
    assert network(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert sum(p.numel() for p in network.parameters()) == 2_766_529
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
    assert int(rows.max() - rows.min()) + 1 == 70  # pixels that a score sees


def lpips_recipe(weights: str):
    return tiny.recipe(decoder={"lpips_weight": 1.0, "lpips_weights": weights})


def hide_lpips(monkeypatch):
    real = importlib.import_module

    def absent(name, *args):
        if name == "lpips":
            raise ModuleNotFoundError("No module named 'lpips'")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", absent)


def test_lpips_is_refused_where_it_is_not_installed(start, tmp_path, monkeypatch):
    hide_lpips(monkeypatch)
    with pytest.raises(UsageError, match=r"pip install 'moesr\[lpips\]', .*decoder\.lpips_weight=0"):
        decoder.prepare(lpips_recipe("vgg.pth"), start, tiny.run(tmp_path))


class FakeLPIPS(nn.Module):
    """The interface of lpips.LPIPS with one layer in place of VGG16's thirteen."""

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
    path.write_bytes(b"junk") if content == "foreign" else torch.save({"classifier.0.weight": torch.ones(1)}, path)
    with pytest.raises(UsageError, match="not torchvision's VGG16 weights"):
        decoder.prepare(lpips_recipe(str(path)), start, tiny.run(tmp_path))


def test_lpips_is_part_of_the_loss(start, tmp_path, fake_lpips):
    path = tmp_path / "vgg.pth"
    weights = {"features.0.weight": torch.randn(2, 3, 1, 1), "features.0.bias": torch.randn(2)}
    torch.save({**weights, "features.2.weight": torch.ones(1), "classifier.0.weight": torch.ones(1)}, path)
    task = decoder.prepare(lpips_recipe(str(path)), start, tiny.run(tmp_path))
    total, figures = task.loss(batch(), 0)
    sr, target, _ = task._decode(batch())
    difference = nn.functional.conv2d(sr - target, weights["features.0.weight"])
    torch.testing.assert_close(figures["lpips"], difference.square().mean())
    torch.testing.assert_close(total, figures["l1"] + figures["lpips"] + 10 * figures["ffl"])
    assert "net" not in {name.split(".")[0] for name in task.network.state_dict()}


def test_training_resumes_with_its_discriminator(data, start, tmp_path, monkeypatch):
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
def test_latents_made_before_need_no_photographs(made, data, start, tmp_path):
    if made:
        with pytest.raises(UsageError, match=r"needs photographs \(--data\) or latents"):
            decoder.train(RECIPE, None, tiny.run(tmp_path), start)
        return
    make(data, start, tmp_path / "latents")
    decoder.train(RECIPE, None, tiny.run(tmp_path / "a"), start, made=tmp_path / "latents")
    decoder.train(RECIPE, data, tiny.run(tmp_path / "b"), start)
    assert tiny.losses(tmp_path / "a") == tiny.losses(tmp_path / "b")


def test_checkpoint_of_other_experts_is_refused(data, tmp_path):
    other = tiny.recipe(model={"expert_ranges": [[0, 1000]]})
    start = tiny.stage_1(tmp_path / "other", other)
    with pytest.raises(UsageError, match=r"has experts for \(\(0, 1000\),\), the recipe for"):
        decoder.prepare(RECIPE, start, tiny.run(tmp_path))
